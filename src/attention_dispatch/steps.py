"""Denoising steps: requests that depend on the step, and the scope that tells a thread its step."""

from __future__ import annotations

from typing import Any, NamedTuple

from .errors import InvalidCallError
from .request import Request, Settings, current, leave


class Schedule(NamedTuple):
    """Requests by denoising step.

    Attributes:
        segments: (first step, step after the last one or None, request), in order and without gaps.
    """

    segments: tuple[tuple[int, int | None, Request], ...]

    def at(self, step: int) -> Request | None:
        """The request of a step; None past the end."""
        for start, stop, request in self.segments:
            if start <= step and (stop is None or step < stop):
                return request
        return None

    def __str__(self) -> str:
        return ", ".join(f"{_words(start, stop)}: {request}" for start, stop, request in self.segments)


def _words(start: int, stop: int | None) -> str:
    if stop is None:
        return f"steps {start} and later"
    return f"step {start}" if stop == start + 1 else f"steps {start} to {stop - 1}"


# Every schedule in use, by its key in the thread's table: at a new step each is looked up once, outside the model, so
# that a compiled model guards on the request and not on the step.
_schedules: dict[str, Schedule] = {}


def enlist(schedule: Schedule) -> str:
    """Put a schedule in use. Returns its key in ``Settings.scheduled``."""
    key = str(schedule)
    _schedules[key] = schedule
    _go_to(current.state, current.step)
    return key


def _go_to(state: Settings, step: int | None) -> None:
    """Make ``step`` the denoising step of a thread."""
    state.step = step
    if step is None:
        state.scheduled = {}
    else:
        found = ((key, schedule.at(step)) for key, schedule in _schedules.items())
        state.scheduled = {key: request for key, request in found if request is not None}


def no_step(schedule: str) -> str:
    """Why a schedule has no request now."""
    if current.step is None:
        return (
            f"this module's backend depends on the denoising step ({schedule}), and no step is set. Run the model inside "
            f"`with attention_dispatch.policies.at_step(i):`."
        )
    return f"step {current.step} is past the end of the policy ({schedule}). Give policies.steps the true total."


class at_step:  # lower case: it is used like a function
    """Scope in which the thread is at denoising step ``step``, counted from 0.

    Scopes nest; they may end in another order, as ``attention_backend`` has it.

    Example:
        >>> from attention_dispatch import policies
        >>> for step in range(3):
        ...     with policies.at_step(step):
        ...         pass  # model(latents, timesteps[step])
    """

    __slots__ = ("_place", "step")

    def __init__(self, step: int):
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise InvalidCallError(f"a step is a count from 0, got {step!r}.")
        self.step = step
        self._place: Any = None  # as in attention_backend

    def __enter__(self) -> at_step:
        state = current.state
        self._place = (state, len(state.steps), self._place)
        state.steps.append(self.step)
        _go_to(state, self.step)
        return self

    def __exit__(self, *exception: object) -> None:
        state, index, self._place = self._place
        _go_to(state, leave(state.steps, index))


def advance_step(pipeline: Any, step: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
    """For diffusers' ``callback_on_step_end``, inside ``with at_step(0)``: after step i the thread is at step i + 1.

    Raises:
        InvalidCallError: the thread is in no ``at_step``.
    """
    state = current.state
    if not state.steps:
        raise InvalidCallError("advance_step moves the step of a scope: run the pipeline inside `with at_step(0):`.")
    state.steps[-1] = step + 1
    _go_to(state, step + 1)
    return callback_kwargs
