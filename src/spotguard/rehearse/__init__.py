"""Rehearsing preemptions: any training script, once untouched and once interrupted, and a comparison of what comes out.

Interrupted by real signals, or by all that a platform delivers, its metadata service included. Reads what the guard says over its gate and
what stands in the two stores; nothing in the core knows about it.
"""

from spotguard.rehearse.console import ConsoleObserver, print_report, watching
from spotguard.rehearse.page import render_page, write_page
from spotguard.rehearse.plan import Interruption, plan_interruptions
from spotguard.rehearse.report import Report
from spotguard.rehearse.scenario import Scenario, scenarios
from spotguard.rehearse.session import Observer, RehearsalOptions, rehearse
from spotguard.rehearse.slow_store import SlowStore

__all__ = [
    "ConsoleObserver",
    "Interruption",
    "Observer",
    "RehearsalOptions",
    "Report",
    "Scenario",
    "SlowStore",
    "plan_interruptions",
    "print_report",
    "rehearse",
    "render_page",
    "scenarios",
    "watching",
    "write_page",
]
