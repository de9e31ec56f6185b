"""What is done with a run from outside: read how it stands, examine the place it runs in. Never a live guard."""
