"""lm-evaluation-harness (EleutherAI) with our models: the package lm_eval.

`Scorer` answers the three kinds of requests that the harness has, and does not need the package.
"""

import functools
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from yocou_jax.data.tokenizer import Tokenizer
from yocou_jax.errors import UserError
from yocou_jax.evaluation import python_docs
from yocou_jax.evaluation.options import Options, models
from yocou_jax.evaluation.perplexity import rows_at_once
from yocou_jax.inference import PreparedModel, Sampling, fork, generate, prefill, prepare, score
from yocou_jax.inference.request import bucket, padded
from yocou_jax.inference.text import TextRow
from yocou_jax.pretrained import Pretrained
from yocou_jax.sharding import batch_ways

NEW_TOKENS = 256  # of a text without max_gen_toks, as in the harness
ROWS = 16  # texts that are generated at the same time
# The package encodes both texts together, and cuts the ids where those of the context alone end.
SPLIT = "context and continuation are encoded together; each alone if a token has letters of both"
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p"}


def split(
    tokenizer: Tokenizer, context: str, continuation: str, end_of_text: bool
) -> tuple[list[int], int]:
    """The ids of both texts together, and how many ids at the end are those of the continuation.

    As in the harness, spaces at the end of the context count as part of the continuation, and both
    texts are encoded together. But a token may have characters of both; then each is encoded alone,
    so that every continuation of a context comes after the same ids. With end_of_text, the
    end-of-text token comes first, as before each document in training; without a context it always
    does, because something must predict the first token.
    """
    bare = context.rstrip()
    context, continuation = bare, context[len(bare) :] + continuation
    before, ids = tokenizer.encode(context), tokenizer.encode(context + continuation)
    if ids[: len(before)] != before:
        ids = before + tokenizer.encode(continuation)
    first = [tokenizer.eot_id] if end_of_text or not before else []
    return first + ids, len(ids) - len(before)


class Scorer:
    """A model that answers requests of the harness. Use it inside `jax.set_mesh(mesh)`.

    A context is prefilled once for all its continuations, and forked. This is exact: prefill leaves
    out the cross-decoder for positions whose logits nobody reads, and the score of a continuation
    reads those of its own tokens and of the last one of the context.

    end_of_text: whether the end-of-text token comes before every context (see `split`). Contexts
    are never cut, also if they are longer than the sequences in training. longest: the number of
    tokens of the longest request so far. prefilled: the number of contexts that were run so far.
    """

    def __init__(self, loaded: Pretrained, mesh: Mesh, end_of_text: bool = True):
        self.loaded, self.mesh, self.end_of_text = loaded, mesh, end_of_text
        self.longest = 0
        self.prefilled = 0

    def loglikelihood(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): log p(continuation | context) in nats, and whether
        greedy sampling would give the continuation."""
        tokenizer = self.loaded.tokenizer
        return self._likelihoods([split(tokenizer, *pair, self.end_of_text) for pair in pairs])

    def loglikelihood_rolling(self, texts: Iterable[str]) -> list[float]:
        """log p of whole texts in nats, after the end-of-text token. A text is one sequence, so
        every token sees all tokens before it."""
        encoded = [split(self.loaded.tokenizer, "", text, True) for text in texts]
        return [logp for logp, _ in self._likelihoods(encoded)]

    def generate_until(self, requests: Iterable[tuple[str, dict[str, Any]]]) -> list[str]:
        """For each (context, settings): the text that the model writes, up to the first text of
        settings["until"]. Raises UserError for a setting that is not in KNOWN."""
        requests = list(requests)
        for unknown in (name for _, settings in requests for name in settings.keys() - KNOWN):
            raise UserError(f"The task asks for {unknown!r}, but generation has only {KNOWN}.")
        written = []
        for first in range(0, len(requests), ROWS):
            written += self._generate(requests[first : first + ROWS])
        return written

    @functools.cached_property
    def _model(self) -> PreparedModel:
        return prepare(self.loaded.params, self.loaded.config, self.loaded.compute)

    def _likelihoods(self, sequences: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """sequences: ids, and how many at the end count. Long ones come first, so that memory runs
        out early or never: at most that of `rows_at_once` contexts, and of as many copies."""
        lengths = [len(ids) for ids, _ in sequences]
        endings: dict[tuple[int, ...], list[int]] = {}
        for i, (ids, count) in enumerate(sequences):
            endings.setdefault(tuple(ids[: len(ids) - count]), []).append(i)
        longest = {context: max(lengths[i] for i in found) for context, found in endings.items()}
        contexts = sorted(endings, key=lambda context: -longest[context])
        self.longest = max(self.longest, *longest.values(), 0)
        found: dict[int, tuple[float, bool]] = {}
        while contexts:
            rows = rows_at_once(bucket(longest[contexts[0]]), self.mesh)
            some, contexts = contexts[:rows], contexts[rows:]
            chosen = [(row, i) for row, context in enumerate(some) for i in endings[context]]
            found |= self._batch(
                self._filled(some, min(rows, len(endings))),
                [(row, i, sequences[i][0][len(some[row]) :]) for row, i in chosen],
                min(rows, len(sequences)),
            )
        return [found[i] for i in range(len(sequences))]

    def _filled(self, rows: list, size: int) -> list:
        """Repeats the first row until there are `size`, or some more that the devices can share.
        So batches have few shapes, and few programs are compiled."""
        ways = batch_ways(self.mesh)
        return rows + rows[:1] * (-(-size // ways) * ways - len(rows))

    def _batch(
        self, contexts: list[tuple[int, ...]], endings: list[tuple[int, int, list[int]]], size: int
    ) -> dict[int, tuple[float, bool]]:
        """The results of endings (row of the context, name of the result, ids), `size` at once."""
        found = {name: (0.0, True) for _, name, ids in endings if not ids}
        endings = sorted((one for one in endings if one[2]), key=lambda one: -len(one[2]))
        if not endings:
            return found
        longest = len(endings[0][2])
        memory, logits = prefill(self._model, *padded(contexts), new_tokens=longest)
        self.prefilled += len(set(contexts))
        for first in range(0, len(endings), size):
            some = endings[first : first + size]
            rows, _, texts = zip(*self._filled(some, size), strict=True)
            scores = score(
                *(self._model, *padded(texts)),
                memory=fork(memory, rows),
                logits=logits[np.array(rows)],
            )
            logprobs, likeliest = jax.device_get((scores.logprobs, scores.likeliest))
            for row, (_, name, ids) in enumerate(some):
                part = row, slice(len(ids))
                logp = logprobs[part].sum(dtype=np.float64)
                found[name] = float(logp), bool(likeliest[part].all())
        return found

    def _generate(self, requests: list[tuple[str, dict[str, Any]]]) -> list[str]:
        tokenizer = self.loaded.tokenizer
        prompts = [split(tokenizer, context, "", self.end_of_text)[0] for context, _ in requests]
        limits, rows, columns = [], [], []
        for _, settings in requests:
            until = settings.get("until", [])
            limits.append(settings.get("max_gen_toks", NEW_TOKENS))
            stops = [until] if isinstance(until, str) else list(until)
            rows.append(TextRow(tokenizer, limits[-1], [stop for stop in stops if stop]))
            drawn = settings.get("do_sample", False)
            columns.append(
                (
                    settings.get("temperature", 1.0) if drawn else 0.0,
                    settings.get("top_k", 0),
                    settings.get("top_p", 1.0),
                )
            )

        def take(tokens: np.ndarray) -> list[bool]:
            for row, new in zip(rows, tokens, strict=True):
                row.add(new)
            return [row.ended for row in rows]

        sampling = Sampling(*map(np.array, zip(*columns, strict=True)))
        stop = [tokenizer.eot_id]
        generate(
            self._model,
            prompts,
            max_new_tokens=limits,
            sampling=sampling,
            stop_tokens=stop,
            on_tokens=take,
        )
        return [row.text for row in rows]


def as_lm(scorer: Scorer):
    """The scorer as an `lm_eval.api.model.LM`. Raises UserError if the package is missing."""
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise UserError(
            f"The task harness needs the package lm_eval ({error}): run 'pip install lm_eval'."
        ) from error

    class Ours(LM):
        def loglikelihood(self, requests, **_):
            return scorer.loglikelihood(request.args for request in requests)

        def loglikelihood_rolling(self, requests, **_):
            return scorer.loglikelihood_rolling(request.args[0] for request in requests)

        def generate_until(self, requests, **_):
            return scorer.generate_until(request.args for request in requests)

    return Ours()


# --- The task -------------------------------------------------------------------------------------


def python_docs_task(folder: Path, seed: int) -> dict:
    """The settings of the example for the harness. Its questions are written to the folder."""
    file = folder / "python_docs.jsonl"
    lines = (json.dumps(asked) + "\n" for asked in python_docs.questions(seed))
    file.write_text("".join(lines), encoding="utf-8")
    return {
        "task": "python_docs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in ("acc", "acc_norm")  # norm: of log p per character of the answer
        ],
        "num_fewshot": 0,
    }


def run(loaded: Pretrained, mesh: Mesh, options: Options) -> dict:
    """`options.harness`: names of tasks of lm-evaluation-harness, or python_docs, which needs no
    network. `options.samples`: the first questions of each task (default: all). `options.few_shot`:
    default: as the task says. `options.loops`: one count.

    Raises UserError if the package or a task is missing.
    """
    ((_, loaded),) = models(loaded, options)
    scorer = Scorer(loaded, mesh, options.end_of_text)
    model = as_lm(scorer)
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    if unknown := set(options.harness) - {"python_docs", *manager.all_tasks}:
        raise UserError(f"lm_eval has no task of the name {', '.join(sorted(unknown))}.")
    with tempfile.TemporaryDirectory() as folder:
        tasks = [
            python_docs_task(Path(folder), options.seed) if name == "python_docs" else name
            for name in options.harness
        ]
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=tasks,
            num_fewshot=options.few_shot,
            limit=options.samples,
            log_samples=False,
            task_manager=manager,
        )
    rows = result_rows(found["results"])
    return {
        "loops": loaded.config.program.loop_counts,
        "end_of_text_prefix": options.end_of_text,
        "few_shot": found["n-shot"],
        "split": SPLIT,
        "template": None,  # of a chat; those of the questions are in "configs"
        "configs": json.loads(json.dumps(found["configs"], default=str)),
        "task_versions": found["versions"],
        "lm_eval": lm_eval.__version__,
        "longest": scorer.longest,
        "scalars": {f"{row['task']}/{row['metric']}": row["value"] for row in rows},
        "tables": {"lm-evaluation-harness": rows},
    }


def draw(report: dict) -> None:
    """There is no figure."""


def result_rows(results: dict[str, dict[str, Any]]) -> list[dict]:
    """One row for each task and metric. The harness names a metric "acc,none", and its standard
    error "acc_stderr,none"."""
    rows = []
    for task, metrics in results.items():
        for name, value in metrics.items():
            metric, _, kind = name.partition(",")
            if isinstance(value, int | float) and kind and not metric.endswith("_stderr"):
                stderr = metrics.get(f"{metric}_stderr,{kind}")
                error = float(stderr) if isinstance(stderr, int | float) else float("nan")
                rows.append({"task": task, "metric": metric, "value": value, "stderr": error})
    return rows
