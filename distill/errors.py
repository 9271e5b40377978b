"""The exceptions that recipes turn into a message without a traceback."""


class UserError(Exception):
    """Something a user can cause and mend: the message names the file, row or value, and what would be right."""

    def __str__(self) -> str:
        """The message alone: torch's data loader puts the traceback of a worker process before it."""
        text = super().__str__()
        return text.rpartition("UserError: ")[2].rstrip() if text.startswith("Caught UserError in ") else text


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to stop: the message says how to go on, and the exit status is 128 + its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.status = 128 + number


MAX_LISTED = 20


def raise_all(title: str, faults: list[str]) -> None:
    """Raise one UserError that lists the first 20 faults; do nothing when there is none."""
    if not faults:
        return
    listed = "\n".join(f"  - {fault}" for fault in faults[:MAX_LISTED])
    more = len(faults) - MAX_LISTED
    tail = f"\n  ... and {more} more" if more > 0 else ""
    raise UserError(f"{title} ({len(faults)}):\n{listed}{tail}")
