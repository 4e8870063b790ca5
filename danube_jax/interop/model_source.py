"""What `--model=DIR` names: a run's folder, one of its checkpoints, or a Hugging Face folder."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from danube_jax import files
from danube_jax.array_checksums import row_blocks
from danube_jax.config import ModelConfig, TokenizerConfig, parse_model_config
from danube_jax.console import progress, warn
from danube_jax.data.tokenizer import Tokenizer, load_tokenizer, open_tokenizer
from danube_jax.errors import UserError
from danube_jax.interop import hf_config
from danube_jax.interop.hf_weights import Leaf, group_key, layout, set_leaf
from danube_jax.interop.step_params import DamagedCheckpoint, LeafPath, StepParams
from danube_jax.interop.weight_files import WeightFiles
from danube_jax.models.lora import LoraConfig, abstract_adapters, merge_kernel
from danube_jax.models.projections import FUSED, projection_shapes
from danube_jax.untrusted import refuse_misspelt

Params = dict[str, Any]
Kind = Literal["workdir", "huggingface"]

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
OUR_KEY = "danube_jax"  # only our own config.json has it
ADAPTER_CONFIG = "adapter_config.json"
_PREPARED_TOKENIZER = "data/tokenizer.model"  # of a run that trained its own


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model on disk; nothing of its weights is read before it is asked for.

    Attributes:
      path: the run's folder or the Hugging Face folder.
      kind: which of the two.
      step: the newest or the chosen checkpoint; None for a Hugging Face folder.
      config: the model.
      generation: what generation_config.json says, or {}.
      saved: the folder's config.json.
      steps: checkpoints that may be used, newest first.
      lora: set where the checkpoint holds adapters, which belong to `base`.
      base: the model that the adapters belong to.
    """

    path: Path
    kind: Kind
    step: int | None
    config: ModelConfig
    generation: Mapping[str, Any]
    saved: Mapping[str, Any]
    steps: tuple[int, ...] = ()
    lora: LoraConfig | None = None
    base: "ModelSource | None" = None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the folder carries, or that its config names.

        Raises:
          UserError: there is none, or it cannot be read.
        """
        if self.kind == "huggingface":
            return open_tokenizer(self.path)
        if (self.path / TOKENIZER).is_dir():
            files.check_sums(self.path / TOKENIZER)
            return open_tokenizer(self.path / TOKENIZER)
        if self.base is not None:
            return self.base.tokenizer()
        named = self.saved.get("config", {}).get("data", {})
        config = TokenizerConfig(**named.get("tokenizer", {}))
        if config.path or config.builtin:
            return load_tokenizer(config)
        if config.train_vocab_size:
            folder = named.get("directory") or self.path / "data"
            return open_tokenizer(Path(folder) / Path(_PREPARED_TOKENIZER).name)
        raise UserError(
            f"{self.path}: no tokenizer; expected the folder {self.path / TOKENIZER} with "
            "tokenizer.model or tokenizer.json"
        )

    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a text: those of generation_config.json and the tokenizer's.

        Raises:
          UserError: what the folder states is no token id.
        """
        imported = self.saved.get("huggingface", self.saved)
        stated = self.generation.get("eos_token_id", imported.get("eos_token_id"))
        ids = list(stated) if isinstance(stated, list | tuple) else [stated]
        for i in ids:
            if i is not None and (type(i) is not int or not 0 <= i < 2**31):
                raise UserError(
                    f"{self.path}: eos_token_id is {stated!r}; expected a token id or several"
                )
        with contextlib.suppress(UserError):  # a model without a tokenizer generates from ids
            ids.append(self.tokenizer().eos_id)
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def load_params(self, dtype: Any = None) -> Params:
        """The parameters as JAX arrays; adapters are merged into their base.

        Args:
          dtype: dtype to convert to; None keeps the stored one.

        Raises:
          UserError: no checkpoint, or files that cannot be read or used.
        """
        params, _ = self.load_params_and_step(dtype)
        return params

    def load_params_and_step(self, dtype: Any = None) -> tuple[Params, int | None]:
        """`load_params`, and the step that was read: an older one where the newest is damaged."""

        def load(reader: "LeafReader") -> Params:
            params: Params = {}
            elements = sum(int(np.prod(leaf.shape)) for leaf in reader.leaves)
            with progress(f"reading {self.path}", elements, "parameters") as advance:
                for leaf, array in reader:
                    array = jnp.asarray(array, dtype or reader.dtype(leaf))
                    set_leaf(params, leaf.path, array)
                    advance(array.size)
            return params

        return self.with_reader(load)

    def with_reader(self, use: Callable[["LeafReader"], Any]) -> tuple[Any, int | None]:
        """Calls `use` with a reader of the parameters; returns its result and the step.

        `use` is called again with the checkpoint before, and a warning, where one is damaged.

        Raises:
          UserError: there is no checkpoint that can be used.
        """
        if self.kind == "huggingface":
            return use(FolderReader(self.path, self.config)), None
        return self._with_step(lambda step: use(self._reader(step)))

    def adapters(self) -> tuple[Params, int]:
        """The adapters (NumPy, float32) of a LoRA checkpoint, and the step that was read.

        Raises:
          UserError: it holds none, or no checkpoint can be used.
        """
        if self.lora is None:
            raise UserError(f"{self.path}: holds a whole model, no LoRA adapters")
        adapters, step = self._with_step(lambda step: self._read_adapters(step))
        return adapters, step

    def meta(self, step: int) -> Mapping[str, Any]:
        """The JSON of a checkpoint, or {} where it cannot be read."""
        try:
            return StepParams(self._step_folder(step)).meta
        except DamagedCheckpoint:
            return {}

    def checkpoint_folder(self) -> Path:
        """The folder of the newest or the chosen checkpoint, or the Hugging Face folder."""
        path = self.path.resolve()
        return path if self.step is None else path / CHECKPOINTS / str(self.step)

    def _step_folder(self, step: int) -> Path:
        return self.path / CHECKPOINTS / str(step)

    def _with_step(self, use: Callable[[int], Any]) -> tuple[Any, int]:
        if not self.steps:
            raise UserError(f"{self.path}: no checkpoint yet; expected one in {CHECKPOINTS}/")
        for step in self.steps:
            try:
                return use(step), step
            except DamagedCheckpoint as error:
                warn(f"{self._step_folder(step)}: checkpoint cannot be used: {error}")
        raise UserError(
            f"{self.path / CHECKPOINTS}: checkpoint {', '.join(map(str, self.steps))} cannot be "
            "used; restore it from a copy, or name another with its folder"
        )

    def _reader(self, step: int) -> "LeafReader":
        if self.lora is None:
            return CheckpointReader(self._step_folder(step), self.config)
        assert self.base is not None
        frozen = (_read_meta(self, step) or {}).get("frozen") or {}
        adapters = self._read_adapters(step)
        return MergedReader(self.base, adapters, self.lora, expected=frozen.get("fingerprint"))

    def _read_adapters(self, step: int) -> Params:
        assert self.lora is not None
        params = StepParams(self._step_folder(step))
        expected = {
            path: tuple(leaf.shape)
            for path, leaf in _flat(abstract_adapters(self.lora, self.config)).items()
        }
        found = {path: leaf.shape for path, leaf in params.leaves.items()}
        if found != expected:
            raise UserError(
                f"{self._step_folder(step)}: {_first_difference(found, expected)}; the adapters "
                f"do not fit the base {self.base.path if self.base else ''}"
            )
        adapters: Params = {}
        for path, array in params.read(expected).items():
            set_leaf(adapters, path, array)
        return adapters


class LeafReader:
    """Iterates over (leaf, array) of a model in the order of `layout`, in the stored dtype.

    Attributes:
      leaves: what it reads.
      fingerprinting: to be set before reading where `fingerprint` is wanted afterwards.
    """

    leaves: tuple[Leaf, ...]
    fingerprinting = False
    _digests: Mapping[str, str]

    def dtype(self, leaf: Leaf) -> np.dtype:
        """The dtype in which a leaf is stored."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Leaf, np.ndarray]]:
        digests: dict[str, str] = {}
        for leaf, array in self._read():
            if self.fingerprinting:
                digests[".".join(leaf.path)] = _digest(array)
            yield leaf, array
        self._digests = digests

    def fingerprint(self) -> str:
        """Of all values, as float32 whatever the stored dtype; once all have been read."""
        return files.sha256_json(self._digests)[:16]

    def _read(self) -> Iterator[tuple[Leaf, np.ndarray]]:
        raise NotImplementedError


class FolderReader(LeafReader):
    """Reads a Hugging Face folder."""

    def __init__(self, path: Path, config: ModelConfig):
        self._files = WeightFiles(path, config)
        self._files.warn_of_untied_head()
        self.leaves = layout(config)

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._files.dtype(leaf)

    def _read(self) -> Iterator[tuple[Leaf, np.ndarray]]:
        for leaf in self.leaves:
            yield leaf, self._files.read(leaf)


class CheckpointReader(LeafReader):
    """Reads the parameters of a checkpoint, a layer at a time."""

    def __init__(self, step_folder: Path, config: ModelConfig):
        self._params = StepParams(step_folder)
        self.leaves = layout(config)
        expected = {leaf.path: leaf.shape for leaf in self.leaves}
        found = {path: leaf.shape for path, leaf in self._params.leaves.items()}
        if found != expected:
            raise DamagedCheckpoint(
                f"{_first_difference(found, expected)}: not the model of the folder's config.json"
            )

    def dtype(self, leaf: Leaf) -> np.dtype:
        return np.dtype(self._params.leaves[leaf.path].dtype)

    def _read(self) -> Iterator[tuple[Leaf, np.ndarray]]:
        groups: dict[str, list[Leaf]] = {}
        for leaf in self.leaves:
            groups.setdefault(group_key(leaf), []).append(leaf)
        for leaves in groups.values():
            arrays = self._params.read(leaf.path for leaf in leaves)
            for leaf in leaves:
                yield leaf, arrays.pop(leaf.path)


class MergedReader(LeafReader):
    """Reads a base model and adds adapters on the way; changed kernels come in float32.

    Its fingerprint is of the base and the adapters: their sum may round differently elsewhere.
    """

    def __init__(
        self, base: ModelSource, adapters: Params, lora: LoraConfig, expected: str | None = None
    ):
        """`expected` is the fingerprint of the base that the adapters were trained on, if known."""
        self._base, self._adapters, self._lora = base, adapters, lora
        self._reader, _ = base.with_reader(lambda reader: reader)
        self._reader.fingerprinting, self._expected = True, expected
        self.leaves = self._reader.leaves
        self._sizes = {name: out for name, (_, out) in projection_shapes(base.config).items()}

    def dtype(self, leaf: Leaf) -> np.dtype:
        return self._reader.dtype(leaf)

    def __iter__(self) -> Iterator[tuple[Leaf, np.ndarray]]:
        """Raises `UserError` at the end where the base is not the one that was expected."""
        for leaf, array in self._base_leaves():
            names = FUSED.get(leaf.path[1:3], ()) if len(leaf.path) == 4 else ()
            blocks = self._adapters.get(leaf.path[0], {})
            adapters = blocks.get(leaf.path[1], {}) if names else {}
            if set(names) & set(adapters):
                sizes = tuple(self._sizes[name] for name in names)
                kernel = jnp.asarray(array, jnp.float32)
                array = np.asarray(merge_kernel(kernel, adapters, self._lora, names, sizes))
            yield leaf, array
        found = self._reader.fingerprint()
        if self._expected not in (None, found):
            raise UserError(
                f"{self._base.path}: the weights are not those that the adapters were trained on "
                f"(fingerprint {found}, then {self._expected}); bring them back"
            )

    def fingerprint(self) -> str:
        adapters = {".".join(path): _digest(x) for path, x in _flat(self._adapters).items()}
        parts = {"base": self._reader.fingerprint(), "adapters": adapters}
        return files.sha256_json(parts | {"lora": dataclasses.asdict(self._lora)})[:16]

    def _base_leaves(self) -> Iterator[tuple[Leaf, np.ndarray]]:
        try:
            yield from self._reader
        except DamagedCheckpoint as error:  # older adapters would not help
            raise UserError(
                f"{self._base.checkpoint_folder()}: cannot be used as the base of adapters: {error}"
            ) from None


def _digest(array: np.ndarray) -> str:
    """SHA-256 of a vector's or matrix's values as float32."""
    digest = hashlib.sha256(str(array.shape).encode())
    for block in row_blocks(array.reshape(1, -1) if array.ndim < 2 else array):
        digest.update(np.ascontiguousarray(block, np.float32))
    return digest.hexdigest()


def _flat(tree: Mapping[str, Any], path: LeafPath = ()) -> dict[LeafPath, Any]:
    leaves: dict[LeafPath, Any] = {}
    for key, node in tree.items():
        if isinstance(node, Mapping):
            leaves |= _flat(node, (*path, key))
        else:
            leaves[(*path, key)] = node
    return leaves


def _first_difference(
    found: Mapping[LeafPath, tuple[int, ...]], expected: Mapping[LeafPath, tuple[int, ...]]
) -> str:
    for path in sorted(found.keys() | expected.keys()):
        if found.get(path) != expected.get(path):
            there = list(found[path]) if path in found else "missing"
            asked = list(expected[path]) if path in expected else "nothing"
            return f"{'.'.join(path)} is {there} where {asked} is expected"
    return "its arrays"


def open_model(path: str | Path, step: int | None = None) -> ModelSource:
    """Opens a model by its folder.

    Args:
      path: a run's folder (its newest checkpoint is used), one checkpoint of it
        (DIR/checkpoints/STEP), or a Hugging Face folder.
      step: one checkpoint of a run's folder.

    Raises:
      UserError: none of these, or its config is not readable or not supported.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder; expected a run's folder, one of its checkpoints, or a "
            "Hugging Face model folder"
        )
    if path.parent.name == CHECKPOINTS and path.name.isdigit():
        if step is not None and step != int(path.name):
            raise UserError(f"{path}: is checkpoint {path.name}; --step={step} contradicts it")
        path, step = path.parent.parent, int(path.name)
    elif path.name == CHECKPOINTS:
        path = path.parent
    config_path = path / hf_config.CONFIG_FILE
    if not config_path.is_file() and (path / ADAPTER_CONFIG).is_file():
        raise UserError(
            f"{path}: holds a PEFT adapter, no whole model; convert it with "
            "tools/convert_from_hf.py --base=DIR first"
        )
    if config_path.is_file() and OUR_KEY in (saved := hf_config.read_json(config_path)):
        return _open_workdir(path, saved, step)
    if step is not None:
        raise UserError(f"{path}: a Hugging Face folder has no steps; leave out --step")
    config, saved = hf_config.read_config(path)
    return ModelSource(path, "huggingface", None, config, _generation(path), saved)


def _generation(path: Path) -> Mapping[str, Any]:
    file = path / hf_config.GENERATION_FILE
    content = hf_config.read_json(file) if file.is_file() else {}
    refuse_misspelt(content, hf_config.GENERATION_KEYS, file)
    return content


def _open_workdir(path: Path, saved: Mapping[str, Any], step: int | None) -> ModelSource:
    files.check_seal(saved, str(path / hf_config.CONFIG_FILE))
    try:
        model = saved["config"]["model"]
    except (KeyError, TypeError):
        raise UserError(f"{path / hf_config.CONFIG_FILE}: no config.model in it") from None
    try:
        config = parse_model_config(model)
    except UserError as error:
        raise UserError(f"{path / hf_config.CONFIG_FILE}: {error}") from None
    folder = path / CHECKPOINTS
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    steps = sorted((int(name) for name in names if name.isdigit()), reverse=True)
    if step is not None:
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise UserError(f"{path}: no checkpoint {step}; there are: {there}")
        steps = [step]
    source = ModelSource(
        path,
        "workdir",
        steps[0] if steps else None,
        config,
        _generation(path),
        saved,
        tuple(steps),
    )
    return _with_lora(source)


def _with_lora(source: ModelSource) -> ModelSource:
    """`source`, with its base where its checkpoint holds adapters."""
    lora = next((m.get("lora") for s in source.steps if (m := _read_meta(source, s))), None)
    if lora is None:
        return source
    values = {key: value for key, value in lora.items() if key != "base"}
    base_path = Path(lora["base"])
    if not base_path.is_absolute() and (source.path / base_path).is_dir():
        base_path = source.path / base_path
    try:
        config = LoraConfig(**(values | {"targets": tuple(values["targets"])}))
        base = open_model(base_path)
    except UserError as error:
        raise UserError(f"{source.path}: its LoRA base cannot be used: {error}") from None
    return dataclasses.replace(source, lora=config, base=base)


def _read_meta(source: ModelSource, step: int) -> Mapping[str, Any] | None:
    """A step's JSON, read without Orbax, which takes long to open a large checkpoint."""
    path = source.path / CHECKPOINTS / str(step) / "meta" / "metadata"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
