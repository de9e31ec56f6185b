"""Warnings that the job has to go: what they are, where they come from, and the watcher that collects them."""

from spotguard.notices.aws import AwsSource
from spotguard.notices.azure import AzureSource
from spotguard.notices.base import NoticeSource, PreemptionNotice
from spotguard.notices.google import GoogleSource
from spotguard.notices.polling import PollingSource
from spotguard.notices.signals import SignalSource
from spotguard.notices.watched import FileSource, UrlSource
from spotguard.notices.watcher import NoticeWatcher

__all__ = [
    "AwsSource",
    "AzureSource",
    "FileSource",
    "GoogleSource",
    "NoticeSource",
    "NoticeWatcher",
    "PollingSource",
    "PreemptionNotice",
    "SignalSource",
    "UrlSource",
]
