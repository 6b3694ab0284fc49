"""``EditHook``: properties kept provable while any loop trains.

Every so many optimizer steps certified margins are evaluated on the weights as they are. Where one
is missed, the weights are moved in place to a nearby point whose bounds prove all properties, by a
few linearized projections; training goes on from there and recovers what the move cost. "Nearby" is
measured by the optimizer's second moments where it keeps them (Adam and kin, RMSprop, Adagrad), so
that weights on which the loss hardly depends move most; else by the 2-norm. At the end
:func:`~torch_prepared.edit.edit_network` edits once more if need be, and the checker certifies.

Soundness: margins during training are bounds in the working precision, a guide and no proof. Only
the certificate that ``finish`` returns is one.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from torch_prepared.bounds import PropertyBatch
from torch_prepared.certify import Verdict
from torch_prepared.edit import edit_network
from torch_prepared.edit._behavior import Reference
from torch_prepared.errors import InfeasibleEditError, PreparedError, PreparedWarning, SpecError
from torch_prepared.hooks._finish import Finished, better, compared, moved_copy
from torch_prepared.hooks._live import LiveModel, no_autocast, unwrap
from torch_prepared.hooks._margins import LiveMargins
from torch_prepared.hooks._memory import RowMemory
from torch_prepared.hooks._optimizer import inverse_metric, settle_optimizer
from torch_prepared.hooks._ranks import Ranks
from torch_prepared.hooks._record import HookRecord, OnFailure, OptimizerState, Outcome
from torch_prepared.hooks._restore import Restored, restore
from torch_prepared.hooks.schedule import EverySteps, Schedule
from torch_prepared.specs import Property

__all__ = ["EditHook", "Finished"]

logger = logging.getLogger(__name__)

RELATIVE_MARGIN = 0.05  #: of the output rows' usual size: room for the steps until the next look
ROOMY_MARGIN = 0.2  #: likewise where a metric keeps the loss from rising
NEEDED_SHARE = 0.5  #: of the margin aimed at, which an edit must reach
MISSED_SHARE = 0.1  #: of the margin aimed at, below which weights are edited
LOSS = 0.005  #: share of decisions that ``finish`` may change without asking an editor
FORMAT = 1


class EditHook:
    """Keeps properties provable during training; framework-free.

    Call ``after_step(model, step)`` with the number of optimizer steps taken so far, and
    ``finish(model)`` at the end; or let an adapter do it (``attach``, ``lightning``, ``hf``).

    Args:
        properties: all that must hold, for every input of their regions, in evaluation mode.
        schedule: when to look; see :class:`Schedule`.
        preserve: inputs (q, ...) on which ``finish`` keeps the network as training left it.
        labels: right classes (q,) of ``preserve``, to report accuracy.
        margin: safety margin aimed at, in output units; None: what survives rounding in
            ``finish``, and during training 20 % of the output rows' usual size, 5 % with
            optimizers whose state gives no metric.
        method: editor of ``finish``; see :func:`~torch_prepared.edit.edit_network`.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"``; weights stay as they were in any case.
        time_limit: wall seconds of each of the at most two edits of ``finish``.
        seed: of ``finish``.
        threads: CPU threads of LP solvers in ``finish``.
        optimizer_state: ``"keep"``, ``"project"`` or ``"reset"``: see :class:`OptimizerState`.
        rounds: linearizations per edit at most.
        example_input: (1, ...) input to trace the model with; defaults to ``preserve[:1]``.

    Attributes:
        records: one :class:`HookRecord` for every look at the model, oldest first.

    Raises:
        SpecError: no properties, or an unknown policy.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> safe = SafeSet.argmax(0, classes=2)
        >>> hook = EditHook(Property(Box([0.0, 0.0], [0.1, 0.1]), safe), schedule=EverySteps(1))
        >>> hook.after_step(model, 1).margin_after > 0
        True
    """

    def __init__(
        self,
        properties: Property | Sequence[Property],
        *,
        schedule: Schedule = EverySteps(),  # noqa: B008 - frozen
        preserve: Tensor | None = None,
        labels: Tensor | None = None,
        margin: float | None = None,
        method: str = "sequential",
        on_failure: str | OnFailure = OnFailure.WARN,
        time_limit: float | None = 60.0,
        seed: int = 0,
        threads: int | None = None,
        optimizer_state: str | OptimizerState = OptimizerState.KEEP,
        rounds: int = 10,
        example_input: Tensor | None = None,
    ) -> None:
        several = (properties,) if isinstance(properties, Property) else tuple(properties)
        if not several:
            raise SpecError("EditHook properties: got none; expected at least one")
        if margin is not None and not 0.0 < margin < float("inf"):
            raise SpecError(f"EditHook margin: got {margin}; expected a positive number or None")
        if rounds < 1:
            raise SpecError(f"EditHook rounds: got {rounds}; expected at least 1")
        self.properties = several
        self.schedule = schedule
        self.preserve = preserve
        self.labels = labels
        self.margin = margin
        self.method = method
        self.on_failure = OnFailure.named(on_failure)
        self.time_limit = time_limit
        self.seed = seed
        self.threads = threads
        self.optimizer_state = OptimizerState.named(optimizer_state)
        self.rounds = rounds
        self.example_input = example_input
        self.records: list[HookRecord] = []
        self.last_step = 0
        self._ranks = Ranks()
        self._memory = RowMemory()
        self._live: LiveModel | None = None
        self._batch: PropertyBatch | None = None

    # The loop

    def should_edit(self, step: int) -> bool:
        """Whether to look at the model after ``step`` optimizer steps; override for a policy."""
        return self.schedule.due(step)

    def after_step(
        self, model: nn.Module, step: int, *, optimizer: torch.optim.Optimizer | None = None
    ) -> HookRecord | None:
        """Tell the hook that ``step`` optimizer steps have been taken; it edits in place if due.

        Calls that repeat a step (micro-batches of gradient accumulation) do nothing.

        Args:
            model: the model in training; may be wrapped (``DistributedDataParallel``,
                ``torch.compile``, averages). With several ranks all must call; the first edits.
            step: optimizer steps so far, 1 after the first.
            optimizer: needed unless ``optimizer_state`` is ``"keep"``.

        Returns:
            What was done, or None when nothing was due.

        Raises:
            SpecError: properties that do not fit the model, or a missing optimizer.
            UnsupportedOperationError: an operator without a sound treatment.
            InfeasibleEditError: no provable point was found and ``on_failure`` is ``"raise"``.
        """
        if step <= self.last_step:
            return None
        self.last_step = step
        if not self.should_edit(step):
            return None
        if self.optimizer_state is not OptimizerState.KEEP and optimizer is None:
            raise SpecError(
                f"EditHook.after_step: got no optimizer; expected one, as optimizer_state is "
                f"'{self.optimizer_state.value}'"
            )
        return self._look(model, step, optimizer)

    def certified_margins(self, model: nn.Module) -> Tensor:
        """Certified lower bounds (b,) of the margins now, in the model's precision."""
        live = self._capture(model)
        return self._margins(live).value(live.theta())

    def finish(self, model: nn.Module) -> Finished:
        """Edit once more, certify, and load the certified weights.

        First the cheap way of training's edits, in the metric of the last look. Where it finds
        nothing, or costs more than 0.5 % of the decisions on the reference inputs, ``method``
        edits what training left, and the better result counts.

        Args:
            model: the model that training left, or an average of it. Its weights are replaced in
                place when, and only when, the result is certified.

        Returns:
            The edit's result; ``result.model`` is a copy of the user's module, ``status`` the
            checker's word on it, the report's changes are those since training. The same on every
            rank.

        Raises:
            InfeasibleEditError: nothing was certified and ``on_failure`` is ``"raise"``.
            SpecError: every layer has a frozen parameter.
        """
        live = self._capture(model)
        if live.layers == ():
            raise SpecError(
                "EditHook.finish: got no layer whose parameters are all trained; expected one"
            )
        result = None
        if self._ranks.first:
            with torch.inference_mode(False), torch.enable_grad(), no_autocast(live.sample()):
                result = self._closest(live)
        found = self._ranks.tell(result)
        if found.status is Verdict.CERTIFIED and isinstance(found.model, nn.Module):
            live.load(found.model)
        else:
            self._complain(f"EditHook.finish: {found.report.message}; weights stay as they were")
        return found

    def _closest(self, live: LiveModel) -> Finished:
        """The cheap way, and the editor where that does not do."""
        cheap, (found, _) = None, self._decide(live, self.last_step, last=True)
        if found is not None and found.reached:
            moved = bool(found.rounds)
            near = moved_copy(live, found.theta) if moved else live.module
            cheap = self._certify(live, near)
            if not moved:
                return cheap
        if cheap is not None and cheap.status is Verdict.CERTIFIED:
            graph = live.current()
            given = None if self.preserve is None else self.preserve.to(live.sample())
            reference = Reference.of(graph, given, self.labels, None, self.properties, self.seed)
            cheap = compared(live, reference, cheap)
            drawdown = cheap.report.drawdown
            if drawdown is None or drawdown.score[0] <= LOSS:
                return cheap
        return better(cheap, self._certify(live, live.module))

    def _certify(self, live: LiveModel, module: nn.Module) -> Finished:
        """Edit and certify; ``module`` is not changed."""
        return edit_network(
            module,
            self.properties,
            method=self.method,
            preserve=self.preserve,
            labels=self.labels,
            layers=live.layers,
            margin=self.margin,
            time_limit=self.time_limit,
            example_input=live.sample(),
            threads=self.threads,
            seed=self.seed,
            raise_on_failure=False,
        )

    # Checkpoints

    def state_dict(self) -> dict[str, object]:
        """Records, the last step, and the rows that the next edit starts from; all plain data."""
        records = [record.to_json() for record in self.records]
        memory = self._memory.state_dict()
        return {"format": FORMAT, "last_step": self.last_step, "records": records, **memory}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take up where :meth:`state_dict` was taken.

        Raises:
            SpecError: not a state of this class and format.
        """
        step, records = state.get("last_step"), state.get("records")
        if state.get("format") != FORMAT or not isinstance(step, int):
            raise SpecError(
                f"EditHook.load_state_dict: got format {state.get('format')!r}, last_step "
                f"{step!r}; expected format {FORMAT} and an integer"
            )
        if not isinstance(records, list):
            raise SpecError("EditHook.load_state_dict: got no list of records; expected one")
        self._memory = RowMemory.from_state(state, len(self.properties))
        self.records = [HookRecord.from_json(record) for record in records]
        self.last_step = step

    # Parts

    def _capture(self, model: nn.Module) -> LiveModel:
        """The model's structure, read when a model is first seen."""
        if self._live is None or self._live.module is not unwrap(model):
            example = self.preserve if self.example_input is None else self.example_input
            self._live = LiveModel.of(model, self.properties, example)
        return self._live

    def _margins(self, live: LiveModel) -> LiveMargins:
        graph = live.current()
        batch = self._batch
        if batch is None or (batch.rows.dtype, batch.rows.device) != (graph.dtype, graph.device):
            batch = PropertyBatch.of(self.properties, graph.dtype, graph.device)
            self._batch = batch
        return LiveMargins(graph, batch, live.vector)

    def _look(
        self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer | None
    ) -> HookRecord:
        """Evaluate, edit if called for, record; the first rank decides."""
        live = self._capture(model)
        self._memory.fit(live.vector.count)
        with no_autocast(live.sample()):
            self._memory.measure(inverse_metric(optimizer, live.parameters()))
            found, record = self._decide(live, step) if self._ranks.first else (None, None)
            record = self._ranks.tell(record)
            if record.outcome is Outcome.EDITED:
                self._install(live, found, optimizer)
        self.records.append(record)
        logger.debug("%s", record)
        if record.outcome is Outcome.FAILED:
            self._complain(f"EditHook at step {step}: {record.message}; weights stay as they were")
        return record

    def _decide(
        self, live: LiveModel, step: int, *, last: bool = False
    ) -> tuple[Restored | None, HookRecord]:
        """A provable point near the weights as they are, and what will be said of it."""
        wall, cpu = time.monotonic(), time.process_time()
        start, found, before, message = live.theta(), None, float("nan"), ""
        try:
            margins = self._margins(live)
            value = margins.value(start)
            before = float(value.min())
            found = self._walk(margins, start, value, last)
        except PreparedError as error:  # weights that overflow, a projection that fails
            message = str(error)
        moved, after, outcome = 0.0, before, Outcome.FAILED
        if found is not None and found.reached:
            outcome = Outcome.EDITED if found.rounds else Outcome.HELD
            moved, after = float((found.theta - start).norm()), found.lowest
        elif found is not None:
            message = f"the lowest margin is {found.lowest:g} after {found.rounds} rounds"
        record = HookRecord(
            step=step,
            outcome=outcome,
            margin_before=before,
            margin_after=after,
            distance=moved,
            relative_distance=moved / max(float(start.norm()), 1e-30),
            rounds=0 if found is None else found.rounds,
            gradients=0 if found is None else found.gradients,
            seconds=time.monotonic() - wall,
            cpu_seconds=time.process_time() - cpu,
            message=message,
        )
        return found, record

    def _walk(self, margins: LiveMargins, start: Tensor, value: Tensor, last: bool) -> Restored:
        """The start where it will do, else where linearized projections lead."""
        aim = self.margin
        if aim is None:
            tight = last or self._memory.inverse is None
            share = RELATIVE_MARGIN if tight else ROOMY_MARGIN
            aim = share * margins.usual_size(start)
        aim = max(aim, self.schedule.floor / NEEDED_SHARE)
        needed = NEEDED_SHARE * aim
        if not self.schedule.wants_edit(float(value.min()), MISSED_SHARE * aim):
            return Restored(start, value, True, 0)
        return restore(
            margins, self._memory, start, value, aim=aim, needed=needed, rounds=self.rounds
        )

    def _install(
        self,
        live: LiveModel,
        found: Restored | None,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        """Move the weights, on every rank alike, and settle the optimizer's state."""
        if found is not None:
            live.install(found.theta)
        parameters = live.parameters()
        self._ranks.send(parameters)
        if optimizer is None or self.optimizer_state is OptimizerState.KEEP:
            return
        rows = self._memory.rows
        rows = self._ranks.tell(rows) if self.optimizer_state is OptimizerState.PROJECT else None
        settle_optimizer(optimizer, self.optimizer_state, parameters, rows)

    def _complain(self, message: str) -> None:
        if self.on_failure is OnFailure.RAISE:
            raise InfeasibleEditError(message)
        if self.on_failure is OnFailure.WARN:
            warnings.warn(message, PreparedWarning, stacklevel=3)
