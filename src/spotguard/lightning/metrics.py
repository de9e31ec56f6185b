"""What has been logged so far: accumulators of ``self.log``, metric objects, and the metrics that callbacks read.

Lightning saves none of it. Without it the mean of an epoch that was interrupted is the mean of its second part, a plateau scheduler
finds no metric, and `EarlyStopping` looks at nothing.
"""

import importlib
from typing import Any

import torch
from torchmetrics import Metric

__all__ = ["capture_logged", "capture_metrics", "restore_logged", "restore_metrics"]

_LOGGING = ("prog_bar", "logger", "on_step", "on_epoch", "enable_graph")
_META = ("fx", "name", *_LOGGING, "add_dataloader_idx", "dataloader_idx", "metric_attribute")
_KEPT = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics", "_current_fx", "_first_loop_iter")


def capture_metrics(module: torch.nn.Module) -> dict[str, Any]:
    """State of every torchmetrics object inside a module, which its ``state_dict`` leaves out by default."""
    return {name: _metric(part) for name, part in module.named_modules() if isinstance(part, Metric)}


def restore_metrics(module: torch.nn.Module, saved: dict[str, Any]) -> list[str]:
    """Put them back; returns those that are not there any more, in words."""
    here = {name: part for name, part in module.named_modules() if isinstance(part, Metric)}
    for name, state in saved.items():
        if name in here:
            _put(here[name], state)
    return [f"the metric {name!r} of the checkpoint is not there any more" for name in saved if name not in here]


def capture_logged(trainer: Any) -> dict[str, Any]:
    """Accumulators of the training epoch, and the metrics of the trainer."""
    connector = trainer._logger_connector
    results = {
        key: {
            "meta": {name: getattr(item.meta, name) for name in _META},
            "reduce": item.meta.reduce_fx.__name__,
            "sync": item.meta.sync.should,
            "rank_zero_only": item.meta.sync.rank_zero_only,
            "is_tensor": item.is_tensor,
            "has_reset": item.has_reset,
            "double": item.is_tensor and item._defaults["value"].dtype is torch.float64,
            "state": _metric(item) if item.is_tensor else None,
        }
        for key, item in trainer.fit_loop.epoch_loop._results.items()
    }
    return {"results": results, "trainer": {name: _copied(getattr(connector, name)) for name in _KEPT}}


def restore_logged(trainer: Any, host: str, saved: dict[str, Any]) -> None:
    """Put them back."""
    here, device = trainer.fit_loop.epoch_loop._results, trainer.strategy.root_device
    made = importlib.import_module(f"{host}.trainer.connectors.logger_connector.result")
    here.clear()
    for key, item in saved["results"].items():
        # Each later call of self.log() compares what it is given with this, so it has to be exactly what that call would make.
        meta = made._Metadata(**item["meta"], reduce_fx=getattr(torch, item["reduce"]))
        meta.sync = made._Sync(fn=trainer.strategy.reduce, _should=item["sync"], rank_zero_only=item["rank_zero_only"])
        metric = made._ResultMetric(meta, item["is_tensor"])
        if item["double"]:  # made where double precision was the default
            metric._defaults["value"] = metric._defaults["value"].double()
        if item["is_tensor"]:
            _put(metric, item["state"], device)
        else:
            metric.value = trainer.lightning_module.get_submodule(meta.metric_attribute)
            metric._forward_cache = metric.value._forward_cache
        metric.has_reset = item["has_reset"]
        here[key] = metric.to(device)
    connector = trainer._logger_connector
    for name in _KEPT:
        setattr(connector, name, _moved(saved["trainer"][name], device))


def _metric(metric: Any) -> dict[str, Any]:
    return {
        "values": {name: _copied(getattr(metric, name)) for name in metric._defaults},
        "updates": metric._update_count,
        "computed": _copied(metric._computed),
        "cache": _copied(metric._forward_cache),
    }


def _put(metric: Any, state: dict[str, Any], device: torch.device | None = None) -> None:
    for name, value in state["values"].items():
        setattr(metric, name, _moved(value, device if device is not None else metric.device))
    metric._update_count = state["updates"]
    metric._computed, metric._forward_cache = (_moved(state[name], device) for name in ("computed", "cache"))


def _copied(value: Any) -> Any:
    """A container of its own: what is in it is copied when the snapshot is taken."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(item) for item in value]
    return value.detach() if isinstance(value, torch.Tensor) else value


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    return value.to(device, copy=True) if isinstance(value, torch.Tensor) and device is not None else value
