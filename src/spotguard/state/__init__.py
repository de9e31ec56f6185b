"""What training consists of, copied out and put back bit for bit. The torch code of the core."""
