"""Log-probabilities of given tokens under a decoder, on all devices of a mesh.

Inputs are sorted by length and padded to few sizes, so that few programs are compiled; inputs that
share a prefix (`sharing.py`) enter it once; logits are made for the tokens that are asked for and
no others. Rows are spread over the mesh; weights may be sharded over it, as a training run holds
them, and are then gathered for each dispatch.

Shape suffixes: B rows, T tokens of a row, P tokens of a prefix, F families, R rows that go on from
a prefix, D model, V vocabulary, Q questions (a state and the token asked for), N devices.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from danube_jax.evaluation.sharing import Family, Tokens, choose_sizes, find_families, size_grid
from danube_jax.models.decoder import Decoder
from danube_jax.models.kv_cache import KVCache, init_cache
from danube_jax.training.mesh import DATA_AXIS
from danube_jax.training.step import prepare_weights

Params = Any

DISPATCH_TOKENS = 16_384  # of one device
CPU_DISPATCH_TOKENS = 1_024  # activations that stay in a CPU's cache
CACHE_TOKENS = 2 * DISPATCH_TOKENS  # keys and values of rows that go on from prefixes
CPU_CACHE_TOKENS = 16 * CPU_DISPATCH_TOKENS
CHUNK_QUESTIONS = 1_024  # whose logits are held at once
CPU_CHUNK_QUESTIONS = 128
PROGRAM_TOKENS = 1_024  # padding that costs about as much as compiling one program more
IN_FLIGHT = 2  # dispatches that the host runs ahead


@dataclasses.dataclass(frozen=True)
class ScoreRequest:
    """What is asked: the log-probability of `targets`, the last of which follows all of `inputs`.

    Target i of k is what should follow inputs[: len(inputs) - k + 1 + i].
    """

    inputs: Tokens
    targets: Tokens

    def __post_init__(self):
        if not 0 < len(self.targets) <= len(self.inputs):
            raise ValueError(
                f"{len(self.targets)} targets after {len(self.inputs)} inputs: each needs one"
            )


@dataclasses.dataclass(frozen=True)
class Scored:
    """The sum of the targets' log-probabilities, and whether each was the likeliest token."""

    logprob: float
    greedy: bool


@dataclasses.dataclass(frozen=True)
class _Question:
    """A request, and where the states that it asks about lie in a dispatch: row and columns."""

    request: int
    row: int
    column: int


@dataclasses.dataclass
class _Dispatch:
    """States [N, S, D] on the devices, and for each device what is asked about them."""

    states: jax.Array
    columns: int
    questions: list[list[_Question]]


class Scorer:
    """Scores token sequences with a decoder whose parameters are given at each call.

    Attributes:
      computed_tokens: tokens that have entered the model, each shared prefix once, padding not
        counted.
    """

    def __init__(self, decoder: Decoder, *, mesh: Mesh, specs: Any = None, share: bool = True):
        """Builds the programs; nothing is compiled yet.

        Args:
          decoder: the model; activations, cache and weights in its dtype.
          mesh: one axis, over which rows are spread.
          specs: PartitionSpec of each parameter; None means that all are replicated.
          share: whether common prefixes are computed once.
        """
        self._decoder, self._mesh, self._share = decoder, mesh, share
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        self._dispatch_tokens = CPU_DISPATCH_TOKENS if on_cpu else DISPATCH_TOKENS
        self._cache_tokens = CPU_CACHE_TOKENS if on_cpu else CACHE_TOKENS
        self._chunk = CPU_CHUNK_QUESTIONS if on_cpu else CHUNK_QUESTIONS
        self._grid = size_grid(decoder.config.max_position_embeddings)
        self._build_programs(specs)
        self.computed_tokens = 0

    def _build_programs(self, specs: Any) -> None:
        decoder, chunk, block = self._decoder, self._chunk, self._dispatch_tokens
        params_spec = Spec() if specs is None else specs
        rows, whole = Spec(DATA_AXIS), Spec()

        def weights(params: Params) -> dict[str, Params]:
            if specs is None:
                return {"params": params}
            return {"params": prepare_weights(params, specs, decoder.dtype)}

        def program(function: Callable, in_specs: tuple, out_specs: Any, out: Spec) -> Callable:
            mapped = jax.shard_map(
                function,
                mesh=self._mesh,
                in_specs=(params_spec, *in_specs),
                out_specs=out_specs,
                check_vma=False,
            )
            return jax.jit(mapped, out_shardings=NamedSharding(self._mesh, out))

        def states(params: Params, tokens_BT: jax.Array) -> jax.Array:
            h_BTD = decoder.apply(weights(params), tokens_BT, method="hidden_states")
            return _flatten(h_BTD, block)

        def prefill(params: Params, tokens_FP: jax.Array, padding_F: jax.Array) -> KVCache:
            cache = init_cache(decoder.config, *tokens_FP.shape, decoder.dtype)
            _, cache = decoder.apply(
                weights(params),
                tokens_FP,
                cache,
                jnp.int32(0),
                padding_F,
                fresh=True,
                method="decode_states",
            )
            return cache

        def go_on(
            params: Params,
            cache: KVCache,
            tokens_RT: jax.Array,
            family_R: jax.Array,
            padding_F: jax.Array,
        ) -> jax.Array:
            time, length = cache.slots, tokens_RT.shape[1]
            h_RTD, _ = decoder.apply(
                weights(params),
                tokens_RT,
                _copy_rows(cache, family_R, length),
                jnp.int32(time),
                padding_F[family_R],
                method="decode_states",
            )
            return _flatten(h_RTD, block)

        def answer(
            params: Params, h_1SD: jax.Array, where_1Q: jax.Array, target_1Q: jax.Array, chunks: Any
        ) -> tuple[jax.Array, jax.Array]:
            logits = functools.partial(decoder.apply, weights(params), method="logits")
            answers = _answer(logits, h_1SD[0], where_1Q[0], target_1Q[0], chunks, chunk)
            return jax.tree.map(lambda x_Q: x_Q[None], answers)

        self._states = program(states, (rows,), rows, rows)
        self._prefill = program(prefill, (rows, rows), rows, rows)
        self._go_on = program(go_on, (rows, rows, rows, rows), rows, rows)
        self._answer = program(answer, (rows, rows, rows, whole), rows, whole)

    def score(
        self,
        params: Params,
        requests: Sequence[ScoreRequest],
        on_result: Callable[[int, Scored], None],
    ) -> None:
        """Scores requests; `on_result(index, scored)` is called as results arrive, in any order.

        Args:
          params: the decoder's parameters, laid out as `specs` says.
          requests: with inputs no longer than the model's context, and 1 to len(inputs) targets.
          on_result: called once a request.
        """
        pending: collections.deque[Callable[[], None]] = collections.deque()
        for dispatch in self._dispatches(params, requests):
            pending.append(self._ask(params, dispatch, requests, on_result))
            if len(pending) > IN_FLIGHT:
                pending.popleft()()
        while pending:
            pending.popleft()()

    def _dispatches(self, params: Params, requests: Sequence[ScoreRequest]) -> Iterator[_Dispatch]:
        """Runs the decoder over all inputs, each different one once."""
        place: dict[Tokens, int] = {}
        asking: list[list[int]] = []  # for each input the requests about it
        for index, request in enumerate(requests):
            at = place.setdefault(request.inputs, len(place))
            if at == len(asking):
                asking.append([])
            asking[at].append(index)
        inputs = list(place)
        first = [
            len(tokens) - max(len(requests[i].targets) for i in asking[at])
            for at, tokens in enumerate(inputs)
        ]
        families = (
            find_families(inputs, first)
            if self._share
            else [Family((i,), 0) for i in range(len(inputs))]
        )
        alone = [family.members[0] for family in families if family.prefix == 0]
        yield from self._run_alone(params, inputs, alone, requests, asking)
        together = [family for family in families if family.prefix]
        yield from self._run_families(params, inputs, together, requests, asking)

    def _run_alone(self, params, inputs, members, requests, asking) -> Iterator[_Dispatch]:
        if not members:
            return
        lengths = [len(inputs[i]) for i in members]
        sizes = choose_sizes(lengths, self._grid, PROGRAM_TOKENS * self._mesh.size)
        members = sorted(members, key=lambda i: -len(inputs[i]))
        while members:
            size = sizes[len(inputs[members[0]])]
            rows = self._rows(self._dispatch_tokens // size, len(members))
            taken, members = (
                members[: rows * self._mesh.size],
                members[rows * self._mesh.size :],
            )
            tokens_NBT = np.zeros((self._mesh.size, rows, size), np.int32)
            questions: list[list[_Question]] = [[] for _ in range(self._mesh.size)]
            for number, i in enumerate(taken):
                device, row = number % self._mesh.size, number // self._mesh.size
                tokens_NBT[device, row, : len(inputs[i])] = inputs[i]
                questions[device] += _questions(requests, asking[i], row, len(inputs[i]))
                self.computed_tokens += len(inputs[i])
            h = self._states(params, self._put(tokens_NBT.reshape(-1, size)))
            yield _Dispatch(h, size, questions)

    def _run_families(self, params, inputs, families, requests, asking) -> Iterator[_Dispatch]:
        if not families:
            return
        devices, cost = self._mesh.size, PROGRAM_TOKENS * self._mesh.size
        heads = choose_sizes([family.prefix for family in families], self._grid, cost)
        rest = {
            family: max(len(inputs[i]) for i in family.members) - family.prefix
            for family in families
        }
        tails = choose_sizes(
            [rest[family] for family in families for _ in family.members], self._grid, cost
        )
        families = sorted(families, key=lambda f: (-heads[f.prefix], -tails[rest[f]], f.members))
        while families:
            size = heads[families[0].prefix]
            count = self._rows(self._dispatch_tokens // size, len(families))
            taken, families = families[: count * devices], families[count * devices :]
            tail = max(tails[rest[family]] for family in taken)
            tokens_NFP = np.zeros((devices, count, size), np.int32)
            padding_NF = np.zeros((devices, count), np.int32)
            members: list[list[tuple[int, int]]] = [[] for _ in range(devices)]
            for number, family in enumerate(taken):
                device, row = number % devices, number // devices
                padding_NF[device, row] = size - family.prefix
                tokens_NFP[device, row, size - family.prefix :] = inputs[family.members[0]][
                    : family.prefix
                ]
                members[device] += [(row, i) for i in family.members]
                self.computed_tokens += family.prefix
            padding = self._put(padding_NF.reshape(-1))
            cache = self._prefill(params, self._put(tokens_NFP.reshape(-1, size)), padding)
            prefixes = [[family.prefix for family in taken[d::devices]] for d in range(devices)]
            fitting = min(self._dispatch_tokens // tail, self._cache_tokens // (size + tail))
            rows = self._rows(fitting, max(map(len, members)) * devices)
            for begin in range(0, max(map(len, members)), rows):
                now = [part[begin : begin + rows] for part in members]
                yield self._go_on_rows(
                    params, inputs, cache, padding, now, prefixes, (rows, tail), requests, asking
                )

    def _go_on_rows(
        self, params, inputs, cache, padding, members, prefixes, shape, requests, asking
    ) -> _Dispatch:
        """The states of what follows the prefixes in `cache`; `members` are (family, input)."""
        tokens_NRT = np.zeros((self._mesh.size, *shape), np.int32)
        family_NR = np.zeros(tokens_NRT.shape[:2], np.int32)
        questions: list[list[_Question]] = [[] for _ in members]
        for device, part in enumerate(members):
            for row, (family, i) in enumerate(part):
                tokens = inputs[i][prefixes[device][family] :]
                tokens_NRT[device, row, : len(tokens)] = tokens
                family_NR[device, row] = family
                questions[device] += _questions(requests, asking[i], row, len(tokens))
                self.computed_tokens += len(tokens)
        h = self._go_on(
            params,
            cache,
            self._put(tokens_NRT.reshape(-1, shape[1])),
            self._put(family_NR.reshape(-1)),
            padding,
        )
        return _Dispatch(h, shape[1], questions)

    def _ask(self, params, dispatch, requests, on_result) -> Callable[[], None]:
        """Starts the head's work on a dispatch; the result fetches it and reports."""
        wheres, targets = [], []
        for questions in dispatch.questions:
            where, target = [], []
            for question in questions:
                wanted = requests[question.request].targets
                begin = question.row * dispatch.columns + question.column
                where += range(begin, begin + len(wanted))
                target += wanted
            wheres.append(where)
            targets.append(target)
        longest, step = max(map(len, wheres)), dispatch.states.shape[1]
        step = -(-step // self._chunk) * self._chunk
        answers = []
        for begin in range(0, longest, step):
            chunks = -(-(min(longest, begin + step) - begin) // self._chunk)
            where_NQ = _padded([where[begin : begin + step] for where in wheres], step)
            target_NQ = _padded([target[begin : begin + step] for target in targets], step)
            answers.append(
                self._answer(
                    params,
                    dispatch.states,
                    self._put(where_NQ),
                    self._put(target_NQ),
                    np.int32(chunks),
                )
            )

        def report() -> None:
            fetched = [jax.device_get(answer) for answer in answers]
            logprobs_NQ, greedy_NQ = (np.concatenate(x, axis=1) for x in zip(*fetched, strict=True))
            for device, questions in enumerate(dispatch.questions):
                begin = 0
                for question in questions:
                    end = begin + len(requests[question.request].targets)
                    logprob = float(logprobs_NQ[device, begin:end].sum(dtype=np.float64))
                    greedy = bool(greedy_NQ[device, begin:end].all())
                    on_result(question.request, Scored(logprob, greedy))
                    begin = end

        return report

    def _rows(self, fitting: int, wanted: int) -> int:
        """Rows a device: what fits, but no more than a power of two that takes all."""
        each = -(-wanted // self._mesh.size)
        return max(1, min(fitting, 1 << (each - 1).bit_length()))

    def _put(self, array: np.ndarray) -> jax.Array:
        """An array that every process holds whole, its rows spread over the mesh."""
        sharding = NamedSharding(self._mesh, Spec(DATA_AXIS))
        return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def _questions(
    requests: Sequence[ScoreRequest], asking: Sequence[int], row: int, length: int
) -> list[_Question]:
    return [_Question(i, row, length - len(requests[i].targets)) for i in asking]


def _padded(lists: Sequence[Sequence[int]], length: int) -> np.ndarray:
    out = np.zeros((len(lists), length), np.int32)
    for row, values in zip(out, lists, strict=True):
        row[: len(values)] = values
    return out


def _flatten(h_BTD: jax.Array, block: int) -> jax.Array:
    """[1, S, D] with S a multiple of `block`, so that one program answers for all shapes."""
    h_SD = h_BTD.reshape(-1, h_BTD.shape[-1])
    return jnp.pad(h_SD, ((0, -len(h_SD) % block), (0, 0)))[None]


def _copy_rows(cache: KVCache, family_R: jax.Array, more: int) -> KVCache:
    """The cache of each row's prefix, with `more` free slots behind it."""
    free = (0, more)
    return KVCache(
        keys=tuple(jnp.pad(k[family_R], ((0, 0), (0, 0), (0, 0), free)) for k in cache.keys),
        values=tuple(jnp.pad(v[family_R], ((0, 0), (0, 0), free, (0, 0))) for v in cache.values),
    )


def _answer(logits, h_SD, where_Q, target_Q, chunks, size) -> tuple[jax.Array, jax.Array]:
    """float32 [Q] log-probabilities and bool [Q] for the first `chunks` of `size` questions."""

    def one(i, answers):
        begin = i * size
        where = jax.lax.dynamic_slice_in_dim(where_Q, begin, size)
        target = jax.lax.dynamic_slice_in_dim(target_Q, begin, size)
        logits_QV = logits(h_SD[where])
        asked = jnp.take_along_axis(logits_QV, target[:, None], axis=1)[:, 0]
        new = asked - jax.nn.logsumexp(logits_QV, axis=-1), jnp.argmax(logits_QV, -1) == target
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=begin, axis=0)
        return jax.tree.map(update, answers, new)

    start = (jnp.zeros(where_Q.shape, jnp.float32), jnp.zeros(where_Q.shape, bool))
    return jax.lax.fori_loop(0, chunks, one, start)
