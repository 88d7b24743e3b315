"""Checkpoints as a model of lm-eval: ``spattn_olmoe``.

What a request scores does not depend on the requests beside it: rows are padded on the right, where a causal model
looks at nothing, and where the mask follows the length of its input only rows of one length share a batch.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from .. import ranks
from ..model.checkpoint import Checkpoint

log = logging.getLogger(__name__)

_SAMPLING = ("do_sample", "temperature", "top_p", "top_k")

Row = TypeVar("Row", bound=tuple)


@register_model("spattn_olmoe")
class SPAttnLM(TemplateLM):
    """A checkpoint of ours under lm-eval.

    :param checkpoint: an opened checkpoint; or a folder to open, as lm-eval's own command line names it.
    :param batch_size: sequences computed together; changes no score.
    :param max_length: the most tokens that are read at once, by default the length of training. Longer contexts lose
        their beginning; :attr:`truncated` counts them.
    :param follows_input: true or false instead of what the checkpoint was trained with.
    :param tokenizer: a ``tokenizer.json`` instead of the checkpoint's.
    :param device: by default the GPU, where there is one, and on several ranks each one's own.

    lm-eval hands every rank all requests; :mod:`..ranks` shares their batches out.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | str,
        batch_size: int | str = 16,
        max_length: int | None = None,
        follows_input: bool | None = None,
        tokenizer: str | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}: must be a whole number of at least 1")
        self.batch_size = int(batch_size)
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = Checkpoint.open(checkpoint, follows_input=follows_input)
        elif follows_input is not None:
            checkpoint = checkpoint.with_follows_input(follows_input)
        self.checkpoint = checkpoint
        self.max_length = int(max_length or self.checkpoint.sequence_length)
        self.max_gen_toks = int(max_gen_toks)
        self.truncated = 0
        """Requests so far whose context was too long and lost its beginning."""
        self._tokenizer = self.checkpoint.tokenizer(tokenizer)
        self._module = self.checkpoint.load(device)
        self._device = self._module.device

    # ---- tokens ----------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.checkpoint.eos_token_id

    @property
    def tokenizer_name(self) -> str:
        return f"{self.checkpoint.path}/tokenizer.json".replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; like the training data, without special tokens."""
        return self._tokenizer.encode(string, add_special_tokens=False).ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of a context and of its continuation.

        Where the tokenizer merges all of the continuation into the context's last token, nothing of it is left to score:
        it is encoded alone then. A context of no tokens is the end of a text, as an empty one is.
        """
        context_ids, ids = super()._encode_pair(context, continuation)
        return context_ids or [self.eot_token_id], ids or self.tok_encode(continuation)

    # ---- scores ----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is what greedy decoding would give.

        Requests that read the same tokens, as the answers A to D to one question do, share one row.
        """
        rows: dict[tuple[int, ...], list[int]] = {}
        for index, (texts, context, continuation) in enumerate(requests):
            if not continuation or not context:
                raise ValueError(f"request {texts!r} has an empty context or continuation once it is tokenised")
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than max_length={self.max_length}: "
                    f"raise max_length, or leave out the task that has it ({str(texts)[:80]!r}...)"
                )
            read = (context + continuation)[:-1]
            self.truncated += len(read) > self.max_length
            rows.setdefault(tuple(read[-self.max_length :]), []).append(index)

        def compute(batch: list[tuple[tuple[int, ...], list[int]]]) -> list[tuple[int, tuple[float, bool]]]:
            return [
                (index, _score(logprobs, requests[index][2]))
                for indices, logprobs in self._last_logprobs(batch, requests)
                for index in indices
            ]

        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        batches = list(self._batches(list(rows.items())))
        for index, score in ranks.share_out(batches, compute, description="Scoring", quiet=disable_tqdm):
            scores[index] = score
            if requests[index][0] is not None:
                self.cache_hook.add_partial("loglikelihood", requests[index][0], score)
        return scores

    def _batches(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Rows by length, longest first, as many together as the batch size; the first of a row is its tokens."""
        rows = sorted(rows, key=lambda row: (-len(row[0]), row[0]))
        start = 0
        while start < len(rows):
            stop = min(start + self.batch_size, len(rows))
            if self.checkpoint.follows_input:
                length = len(rows[start][0])
                stop = next((i for i in range(start, stop) if len(rows[i][0]) != length), stop)
            yield rows[start:stop]
            start = stop

    @torch.inference_mode()
    def _last_logprobs(
        self, batch: list[tuple[tuple[int, ...], list[int]]], requests: list[tuple[Any, list[int], list[int]]]
    ) -> Iterator[tuple[list[int], Tensor]]:
        """For each row, log-probabilities ``(positions, vocabulary)`` at its last positions, as many as are scored."""
        lengths = torch.tensor([len(tokens) for tokens, _ in batch])
        scored = [max(len(requests[i][2]) for i in indices) for _, indices in batch]
        input_ids = torch.full((len(batch), int(lengths.max())), self.eot_token_id)
        for row, (tokens, _) in enumerate(batch):
            input_ids[row, : len(tokens)] = torch.tensor(tokens)
        # (rows, most scored positions), aligned at each row's own end; a row's spare places repeat its first position
        places = (lengths[:, None] - max(scored) + torch.arange(max(scored))).clamp(min=0)
        logits = self._module.model_forward(input_ids, logits_to_keep=places.to(self.device))
        for row, (_, indices) in enumerate(batch):
            yield indices, logits[row, -scored[row] :].float().log_softmax(-1)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length`` that each predict their own tokens once."""
        windows, owner = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.eot_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(index)
        totals = [0.0] * len(requests)
        for index, (score, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[index] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    # ---- text ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue prompts until one of their stop strings, the end of the text or the most tokens allowed."""
        texts = [""] * len(requests)
        groups: dict[str, list[tuple[tuple[int, ...], int]]] = {}
        for index, request in enumerate(requests):
            prompt, given = request.args
            options = normalize_gen_kwargs(given, self.max_gen_toks)
            room = self.max_length - options["max_gen_toks"]
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={options['max_gen_toks']} leaves no room for a prompt in max_length={self.max_length}"
                )
            tokens = self.tok_encode(prompt) or [self.eot_token_id]
            self.truncated += len(tokens) > room
            groups.setdefault(json.dumps(options, sort_keys=True), []).append((tuple(tokens[-room:]), index))
        for key, rows in groups.items():
            options = json.loads(key)

            def compute(
                batch: list[tuple[tuple[int, ...], int]], options: dict[str, Any] = options
            ) -> list[tuple[int, str]]:
                new = self._continue([tokens for tokens, _ in batch], options)
                return [
                    (index, postprocess_generated_text(self._tokenizer.decode(tokens), options["until"], None))
                    for (_, index), tokens in zip(batch, new, strict=True)
                ]

            batches = list(self._batches(rows))
            for index, text in ranks.share_out(batches, compute, description="Generating", quiet=disable_tqdm):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _continue(self, prompts: list[tuple[int, ...]], options: dict[str, Any]) -> list[list[int]]:
        """New tokens for each prompt, through the KV cache unless the mask follows the length of the input."""
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), self.eot_token_id)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, tokens in enumerate(prompts):
            input_ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = True
        unknown = set(options) - {*_SAMPLING, "until", "max_gen_toks"}
        if unknown:
            raise ValueError(f"generation options {sorted(unknown)} are not supported (known: {', '.join(_SAMPLING)})")
        stops = sorted({id for until in options["until"] for id in self._tokens_with(until)})
        new, _, _ = self._module.generate_batch(
            input_ids,
            attention_mask=mask,
            completions_only=True,
            log_timing=False,
            use_cache=not self.checkpoint.follows_input,
            max_new_tokens=options["max_gen_toks"],
            stop_token_ids=stops or None,
            **{key: options[key] for key in _SAMPLING if options.get(key) is not None},
        )
        self._module.free_inference_cache()  # else scores would go through it as well
        return [_before(row, self.eot_token_id) for row in new.tolist()]

    @functools.cache  # noqa: B019  one model a process, and few stop strings
    def _tokens_with(self, text: str) -> list[int]:
        """The tokens whose own text has ``text`` in it: after any of them there is nothing more to generate."""
        size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return [id for id in range(size) if text and text in self._tokenizer.decode([id])]


def _score(logprobs: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """Sum of a continuation's log-probabilities, in float64, and whether each token is the likeliest."""
    logprobs = logprobs[-len(continuation) :]
    targets = torch.tensor(continuation, device=logprobs.device)
    chosen = logprobs.gather(-1, targets[:, None])
    return float(chosen.double().sum()), bool((logprobs.argmax(-1) == targets).all())


def _before(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
