"""Rehearsing preemptions: any training script, once untouched and once under real signals, and a comparison of what comes out.

Reads what the guard says over its gate and what stands in the two stores; nothing in the core knows about it.
"""

from spotguard.rehearse.console import ConsoleObserver, print_report, watching
from spotguard.rehearse.page import render_page, write_page
from spotguard.rehearse.plan import Interruption, plan_interruptions
from spotguard.rehearse.report import Report
from spotguard.rehearse.session import Observer, RehearsalOptions, rehearse

__all__ = [
    "ConsoleObserver",
    "Interruption",
    "Observer",
    "RehearsalOptions",
    "Report",
    "plan_interruptions",
    "print_report",
    "rehearse",
    "render_page",
    "watching",
    "write_page",
]
