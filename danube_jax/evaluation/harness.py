"""An lm-evaluation-harness model over our decoder.

How text becomes tokens, where BOS stands and what is cut off are those of lm-eval's Hugging Face
backend (`lm_eval.models.huggingface`, version 0.4.13), so that scores can be compared.

Registered as `danube_jax`; `DanubeLM(pretrained=DIR)` is what lm-eval builds from
``--model_args pretrained=DIR``.
"""

import copy
import functools
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from danube_jax.console import progress, warn
from danube_jax.data.tokenizer import Tokenizer
from danube_jax.errors import UserError
from danube_jax.evaluation.scoring import Params, Scored, Scorer, ScoreRequest
from danube_jax.inference.generate import Generator
from danube_jax.inference.requests import check_text
from danube_jax.inference.sampling import SamplingConfig

DEFAULT_NEW_TOKENS = 256
DEFAULT_TOP_K = 50  # of transformers' `generate`, where a task draws at random

TokenRequest = tuple[tuple[str, str] | None, list[int], list[int]]


class Stopped(Exception):
    """An evaluation was asked to stop before it was done."""


@register_model("danube_jax")
class DanubeLM(TemplateLM):
    """Scores and continues text for lm-eval.

    Attributes:
      tokens, requests, seconds: work done; a prefix that requests share counts for each of them.
      template: whether the model has a chat template of its own.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        scorer: Scorer | None = None,
        params: Params = None,
        generator: Generator
        | Sequence[Generator]
        | Callable[[], Sequence[Generator]]
        | None = None,
        tokenizer: Tokenizer | None = None,
        eos_ids: Sequence[int] | None = None,
        generation: Mapping[str, Any] | None = None,
        max_length: int | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        stop: Callable[[], bool] | None = None,
        **ignored: Any,
    ):
        """Opens a model's folder, or takes the parts of one that is in memory.

        Args:
          pretrained: a workdir, a checkpoint step, or a Hugging Face folder.
          scorer, params: what computes log-probabilities, and the weights it is called with.
          generator: what continues text: one, or one a device, or a function that makes them when
            they are needed.
          tokenizer: the model's.
          eos_ids: tokens that end a text; None means the tokenizer's EOS.
          generation: generation_config.json; its repetition penalty holds, as it does in
            transformers.
          max_length: context in tokens; None means the model's.
          dtype: 'auto' (float32 on a CPU, else bfloat16), 'float32' or 'bfloat16'.
          batch_size: lm-eval's own; batches are made by tokens here.
          stop: asked with every answer; once it says True, the evaluation raises `Stopped`.
          ignored: further arguments of lm-eval's command line, such as `device`.
        """
        super().__init__()
        if pretrained is not None:
            from danube_jax.evaluation.loading import open_for_evaluation

            parts = open_for_evaluation(str(pretrained)).load(dtype)
            scorer, params, generator = parts["scorer"], parts["params"], parts["generator"]
            tokenizer, eos_ids = parts["tokenizer"], parts["eos_ids"]
            generation, max_length = parts["generation"], max_length or parts["max_length"]
        self._scorer, self._params, self._generator = scorer, params, generator
        self._tokenizer = tokenizer
        self._eos_ids = tuple(eos_ids or ([] if tokenizer.eos_id is None else [tokenizer.eos_id]))
        self._generation = dict(generation or {})
        self._max_length = int(max_length)
        self.batch_size = batch_size
        self._stop = stop or (lambda: False)
        self.template = tokenizer.chat_template is not None
        self.tokens = self.requests = 0
        self.seconds = 0.0
        self._encode_context = functools.lru_cache(maxsize=1_024)(self.tok_encode)
        if self.prefix_token_id is None:
            raise UserError(
                f"{tokenizer.path}: the tokenizer has neither BOS nor EOS, so a text without "
                "context cannot be scored; name one in tokenizer_config.json"
            )

    @property
    def eot_token_id(self) -> int | None:
        """EOS."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text without context: BOS, or EOS."""
        bos = self._tokenizer.bos_id
        return self._tokenizer.eos_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens that the model takes."""
        return self._max_length

    @property
    def computed_tokens(self) -> int:
        """Tokens that entered the model to be scored, each shared prefix once."""
        return self._scorer.computed_tokens

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's caches of requests."""
        return f"danube_jax_{self._tokenizer.fingerprint[:16]}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids; the tokenizer puts BOS in front unless told otherwise or already there.

        Names of control tokens stand for these tokens, as in lm-eval's Hugging Face backend.

        Raises:
          UserError: the text holds half of a surrogate pair.
        """
        check_text(string, "a text of a task")
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        if add_special_tokens:
            return self._tokenizer.encode_prompt(string)
        return self._tokenizer.encode_markup(string)

    @functools.cached_property
    def _prefix_text(self) -> str:
        return self._tokenizer.piece(self.prefix_token_id)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """`TemplateLM`'s split at the context's last space, with contexts encoded once."""
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        whole = self.tok_encode(stripped + continuation)
        context_ids = self._encode_context(stripped)
        # White space alone, without BOS in front, is no token that something could follow.
        return context_ids or [self.prefix_token_id], whole[len(context_ids) :]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each continuation.

        Raises:
          UserError: a continuation has no token, or more than the model's context; says which.
        """
        encoded: list[TokenRequest] = []
        for request in requests:
            context, continuation = request.args
            if context:
                context_ids, ids = self._encode_pair(context, continuation)
            else:
                ids = self.tok_encode(continuation, add_special_tokens=False)
                begins = ids[:1] == [self.prefix_token_id]
                context_ids, ids = (ids[:1], ids[1:]) if begins else ([self.prefix_token_id], ids)
            self._check_continuation(request, len(ids))
            encoded.append((request.args, context_ids, ids))
        return self._loglikelihood_tokens(encoded)

    def _check_continuation(self, request: Instance, tokens: int) -> None:
        if 0 < tokens <= self.max_length:
            return
        context, continuation = request.args
        where = f"the text {continuation[:40]!r} after {context[-80:]!r}"
        if request.task_name is not None:
            where = f"{request.task_name}, document {request.doc_id} (from 0), {where}"
        raise UserError(
            f"{where}: has {tokens:,} tokens; expected at least one, and at most the model's "
            f"context of {self.max_length:,}"
        )

    def _loglikelihood_tokens(
        self, requests: list[TokenRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """As lm-eval's Hugging Face backend: what is too long loses its beginning."""
        cut = 0
        wanted = []
        for _, context, continuation in requests:
            whole = [*context, *continuation]
            cut += len(whole) > self.max_length + 1
            inputs = whole[-(self.max_length + 1) :][:-1]
            wanted.append(ScoreRequest(tuple(inputs), tuple(continuation)))
        self._warn_of_cut(cut, f"of {len(requests):,} texts are longer than")
        results: list[tuple[float, bool] | None] = [None] * len(requests)
        with (
            self._timed(len(requests), sum(len(request.inputs) for request in wanted)),
            progress("log-likelihoods", len(requests), "requests") as advance,
        ):

            def on_result(index: int, scored: Scored) -> None:
                self._check_stop()
                results[index] = scored.logprob, scored.greedy
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], results[index])
                advance(1)

            self._scorer.score(self._params, wanted, on_result)
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows that overlap by one token."""
        windows: list[TokenRequest] = []
        counts = []
        for request in requests:
            (text,) = request.args
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            before = len(windows)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(windows) - before)
        scores = iter(self._loglikelihood_tokens(windows))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the task's stop strings or EOS; each device takes its own batches."""
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [repr(request.args[1]) for request in requests]
        order = sorted(range(len(requests)), key=lambda i: (settings[i], -len(contexts[i])))
        generators = self._generators()
        batches: list[list[int]] = []
        for i in order:
            full = batches and len(batches[-1]) == generators[0].max_batch
            if not batches or full or settings[batches[-1][0]] != settings[i]:
                batches.append([])
            batches[-1].append(i)
        free = queue.SimpleQueue()
        for generator in generators:
            free.put(generator)

        def run(batch: list[int]) -> tuple[list[int], list[str], int, int]:
            generator = free.get()
            try:
                kwargs = requests[batch[0]].args[1]
                return batch, *self._generate(generator, [contexts[i] for i in batch], kwargs)
            finally:
                free.put(generator)

        results: list[str | None] = [None] * len(requests)
        all_cut = 0
        with (
            self._timed(len(requests), sum(map(len, contexts))),
            progress("generation", len(requests), "requests") as advance,
            ThreadPoolExecutor(len(generators)) as pool,
        ):
            futures = [pool.submit(run, batch) for batch in batches]
            try:
                for future in as_completed(futures):
                    batch, texts, tokens, cut = future.result()
                    self._check_stop()
                    self.tokens += tokens
                    all_cut += cut
                    for i, text in zip(batch, texts, strict=True):
                        results[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    advance(len(batch))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self._warn_of_cut(
            all_cut, f"of {len(requests):,} prompts leave too little room for the answer in"
        )
        return results

    def _warn_of_cut(self, cut: int, what: str) -> None:
        if cut:
            warn(
                f"{cut:,} {what} the model's context of {self.max_length:,} tokens and lose their "
                "beginning"
            )

    def _check_stop(self) -> None:
        if self._stop():
            raise Stopped

    def _generators(self) -> Sequence[Generator]:
        if callable(self._generator):
            self._generator = self._generator()
        if isinstance(self._generator, Generator):
            self._generator = [self._generator]
        return self._generator

    def _generate(
        self, generator: Generator, contexts: list[list[int]], kwargs: Mapping[str, Any]
    ) -> tuple[list[str], int, int]:
        """Continuations of one batch, how many tokens were drawn, and how many contexts cut."""
        options = normalize_gen_kwargs(copy.deepcopy(dict(kwargs)), DEFAULT_NEW_TOKENS)
        eos = None if self.eot_token_id is None else self._tokenizer.piece(self.eot_token_id)
        until = handle_stop_sequences(options.pop("until"), eos=eos)
        new_tokens = options.pop("max_gen_toks")
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(
                f"a task asks for {new_tokens:,} new tokens; expected fewer than the model's "
                f"context of {self.max_length:,}"
            )
        completions = generator.generate(
            [context[-room:] for context in contexts],
            self._sampling(options, until, new_tokens),
        )
        drawn = [completion.tokens for (completion,) in completions]
        texts = [
            postprocess_generated_text(self._tokenizer.decode(tokens), until, None)
            for tokens in drawn
        ]
        cut = sum(len(context) > room for context in contexts)
        return texts, sum(map(len, drawn)), cut

    def _sampling(
        self, options: Mapping[str, Any], until: list[str], new_tokens: int
    ) -> SamplingConfig:
        draws = options.get("do_sample") and options.get("temperature", 0.0) > 0
        setting = self._generation | dict(options)
        penalty = setting.get("repetition_penalty") or 1.0
        return SamplingConfig(
            max_tokens=new_tokens,
            temperature=options["temperature"] if draws else 0.0,
            top_k=(setting.get("top_k", DEFAULT_TOP_K) or 0) if draws else 0,
            top_p=(setting.get("top_p") or 1.0) if draws else 1.0,
            min_p=(setting.get("min_p") or 0.0) if draws else 0.0,
            repetition_penalty=float(penalty),
            stop_tokens=self._eos_ids,
            stop_strings=tuple(text for text in until if text),
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text; where the template refuses a system role, without it.

        Without a generation prompt the text ends with the last message's own words, which a task
        wants continued.
        """
        try:
            text = self._render(chat_history, add_generation_prompt)
        except UserError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            text = self._render(rest, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        begin = text.rfind(last.strip())
        if begin < 0:
            raise UserError("the chat template changes the words of the answer that is to go on")
        kept = last.lstrip() if text[begin:].startswith(last.lstrip()) else last.strip()
        return text[: begin + len(kept)]

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self._tokenizer.render_chat(messages, add_generation_prompt=add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The Jinja source that is applied, or None."""
        return self._tokenizer.chat_template if chat_template else None

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results."""
        return {"model_num_parameters": sum(x.size for x in jax.tree.leaves(self._params))}

    def _timed(self, requests: int, tokens: int) -> "_Timer":
        return _Timer(self, requests, tokens)


class _Timer:
    """Adds what a block does to a model's account, if it ends well."""

    def __init__(self, lm: DanubeLM, requests: int, tokens: int):
        self._lm, self._requests, self._tokens = lm, requests, tokens

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self._lm.seconds += time.perf_counter() - self._start
            self._lm.requests += self._requests
            self._lm.tokens += self._tokens
