"""Warnings that the job has to go: what they are, where they come from, and the watcher that collects them."""

from spotguard.notices.base import NoticeSource, PreemptionNotice
from spotguard.notices.polling import PollingSource
from spotguard.notices.signals import SignalSource
from spotguard.notices.watcher import NoticeWatcher

__all__ = ["NoticeSource", "NoticeWatcher", "PollingSource", "PreemptionNotice", "SignalSource"]
