"""Commands for what only S3 has."""

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from spotguard.cli.output import fail, note, size, to_json
from spotguard.errors import ConfigError, StoreAccessError

__all__ = ["s3_app"]

_T = TypeVar("_T")

s3_app = typer.Typer(name="s3", help="What only S3 has.", no_args_is_help=True)


@s3_app.callback()
def s3_commands() -> None:
    """What only S3 has."""


@s3_app.command("lifecycle")
def lifecycle_command(
    uri: Annotated[str, typer.Argument(help="The run: s3://bucket/prefix.", show_default=False)],
    days: Annotated[
        int,
        typer.Option("--days", min=1, help="How long an overwritten or deleted object, or a broken upload, is kept."),
    ] = 7,
    apply: Annotated[bool, typer.Option("--apply", help="Set the rule, beside those that the bucket has.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Print, or set, a rule that ends what versions and interrupted uploads leave behind; and estimate what they cost now."""
    from spotguard.stores import open_store
    from spotguard.stores.s3 import S3ObjectStore, lifecycle

    store = open_store(uri)
    if not isinstance(store, S3ObjectStore):
        raise ConfigError(f"{uri!r} is not in S3; give s3://bucket/prefix")
    connection, prefix = store.connection, store.address.prefix
    rule = lifecycle.lifecycle_rule(prefix, days=days)
    kept = _allowed(lambda: lifecycle.kept_versions(connection))
    found = lifecycle.rules_of(connection) if apply else _allowed(lambda: lifecycle.rules_of(connection)) or []
    rules = [item for item in found if not (apply and item.get("ID") == rule["ID"])]
    dangers = lifecycle.endangering(rules, prefix, days=days)
    if apply:
        lifecycle.apply_rule(connection, rule)
    if as_json:
        fields = {
            "rule": rule,
            "applied": apply,
            "noncurrent_versions": kept and kept.versions,
            "noncurrent_bytes": kept and kept.size,
            "unfinished_uploads": kept and kept.uploads,
            "estimated_usd_per_month": kept and round(kept.usd_per_month, 4),
            "rules_that_do_harm": [vars(danger) for danger in dangers],
        }
        print(to_json(fields))  # noqa: T201
    else:
        print(to_json({"Rules": [rule]}))  # noqa: T201
        if kept is not None:
            cost = f"about ${kept.usd_per_month:.2f}" if kept.usd_per_month >= 0.01 else "less than $0.01"
            note(
                f"{kept.versions} versions that were overwritten or deleted are kept, {size(kept.size)}: "
                f"{cost} a month at ${lifecycle.PRICE_PER_GB_MONTH} per GB and month; {kept.uploads} uploads are unfinished, "
                "whose bytes are not counted"
            )
        note(
            "the rule is set"
            if apply
            else "nothing has been changed; --apply sets the rule, beside those that the bucket has"
        )
    for danger in dangers:
        where = f"s3://{store.address.bucket}/{prefix}"
        fail(f"warning: the bucket's rule {danger.rule!r} {danger.does}; exclude {where} from it")


def _allowed(ask: Callable[[], _T]) -> _T | None:
    """What the bucket answers; None, with a word about it, to one who may not ask. The rule is printed all the same."""
    try:
        return ask()
    except StoreAccessError as error:
        fail(f"warning: {error}")
        return None
