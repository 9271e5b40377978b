"""What differs between two configurations of one class, and what of it a run folder may change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distill.configuration.faults import dotted, shown
from distill.configuration.options import KIND
from distill.settings import ON_RESUME, Settings


@dataclass(frozen=True)
class Change:
    """An option that differs. rule: what its declaration says of a change, see distill/settings.py."""

    key: str
    old: Any
    new: Any
    rule: str

    @property
    def is_allowed(self) -> bool:
        """Whether a run folder with the old value may be continued with the new one."""
        grows = self.rule == "may_grow" and isinstance(self.old, int) and isinstance(self.new, int)
        return self.rule in ("harmless", "new_entry") or (grows and self.new > self.old)

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.old)} there, {shown(self.new)} now"


def changes(old: Any, new: Any, path: tuple[str, ...] = (), rule: str = "") -> Iterator[Change]:
    """Every option that differs, with its dotted key. An entry that only one of two mappings has counts as a whole."""
    if isinstance(old, Settings) and type(old) is type(new):
        for name in type(new).model_fields:
            yield from changes(getattr(old, name), getattr(new, name), (*path, name), rule or _rule(type(new), name))
    elif isinstance(old, dict) and isinstance(new, dict):
        for name in old | new:
            own = rule if rule != "may_gain" else "" if name in old else "new_entry"
            yield from changes(old.get(name), new.get(name), (*path, name), own)
    elif isinstance(old, Settings) and isinstance(new, Settings):
        yield Change(dotted((*path, KIND)), getattr(old, KIND, None), getattr(new, KIND, None), rule)
    elif old != new:
        yield Change(dotted(path), _plain(old), _plain(new), rule)


def _rule(model: type[Settings], name: str) -> str:
    """What the declaration of an option says, or that of the option which it takes the place of in a base class."""
    for parent in model.__mro__:
        field = parent.model_fields.get(name) if issubclass(parent, Settings) else None
        extra = field.json_schema_extra if field is not None else None
        if isinstance(extra, dict) and ON_RESUME in extra:
            return str(extra[ON_RESUME])
    return ""


def without_harmless(values: Mapping[str, Any], model: type[Settings]) -> dict[str, Any]:
    """Values of a group, without those of options that may differ."""
    return {name: value for name, value in values.items() if _rule(model, name) != "harmless"}


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.model_dump(mode="json", exclude_unset=True)
    return list(value) if isinstance(value, tuple) else value
