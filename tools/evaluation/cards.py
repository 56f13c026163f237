"""Scores as lines of text for a person to read, with everything that the figures depend on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tools.evaluation.contamination import Contamination
from tools.evaluation.heldout import HeldOut, SourceScore
from tools.evaluation.multiple_choice import TaskScore
from tools.evaluation.ngrams import N_WORDS
from tools.evaluation.perplexity import Perplexity


def perplexity_card(result: Perplexity) -> list[str]:
    """The four figures of a perplexity, its protocol, its text and its model."""
    model = result.model
    card = [
        f"{result.task}: {model['model']} ({model['parameters']:,} parameters)",
        f"  token perplexity  {_figure(result.token_perplexity)}"
        f"{_error(result.token_perplexity_error)}",
        f"  word perplexity   {_figure(result.word_perplexity)}",
        f"  byte perplexity   {_figure(result.byte_perplexity)}",
        f"  bits per byte     {result.bits_per_byte:.4f}{_error(result.bits_per_byte_error)}",
        f"protocol  {result.protocol}, context {result.context:,}, stride {result.stride:,}, "
        f"BOS {result.bos}, {result.read_as}",
        f"text      {result.text_tokens:,} tokens, {result.text_bytes:,} bytes, "
        f"{result.text_words:,} words; sha256 {result.text_sha256}",
        f"scored    {result.scored_tokens:,} tokens in {result.windows:,} windows"
        f"{' (a limit)' if result.limit else ''}, {result.scored_share:.4%} of the text's bytes; "
        f"tail of {result.tail_dropped:,} tokens dropped",
        *_provenance(model, result.time_s),
    ]
    if result.beyond_training:
        card.append(
            f"note      context {result.context:,} is beyond training, where rows had "
            f"{model['trained_context']:,} tokens"
        )
    return card


def protocols_card(results: Sequence[Perplexity]) -> list[str]:
    """One model and text under several protocols, side by side."""
    first = results[0]
    head = ("protocol", "text read", "context", "BOS", "scored", "token", "word", "byte", "bits")
    rows = [
        (
            result.protocol,
            result.read_as.replace("\n", "\\n"),
            f"{result.context:,}",
            result.bos,
            f"{result.scored_tokens:,}",
            _figure(result.token_perplexity) + _error(result.token_perplexity_error),
            _figure(result.word_perplexity),
            _figure(result.byte_perplexity),
            f"{result.bits_per_byte:.4f}{_error(result.bits_per_byte_error)}",
        )
        for result in results
    ]
    return [
        f"{first.task}: {first.model['model']} ({first.model['parameters']:,} parameters); "
        "perplexities per token, word and byte; bits a byte",
        *_aligned([head, *rows]),
        f"text      {first.text_bytes:,} bytes, {first.text_words:,} words; sha256 "
        f"{first.text_sha256}",
        *_provenance(first.model, sum(result.time_s for result in results)),
    ]


def task_card(result: TaskScore) -> list[str]:
    """The accuracies of a task, how it was put, and the model."""
    few = f"{result.num_fewshot}-shot"
    shots = f"{few} (examples: {result.examples_from})" if result.num_fewshot else few
    cut = f", {result.truncated:,} pairs cut on the left" if result.truncated else ""
    return [
        f"{result.task}: {result.model['model']} ({result.model['parameters']:,} parameters)",
        *(
            f"  {name:<17} {_figure(figure.value)}{_error(figure.error)}"
            for name, figure in result.metrics.items()
        ),
        f"put       {shots}, context {result.context:,}, BOS {result.bos}{cut}",
        f"items     {result.items:,}{' (a limit)' if result.limit else ''} of {result.data}; "
        f"sha256 {result.items_sha256}",
        *_provenance(result.model, result.time_s),
    ]


def contamination_card(result: Contamination) -> list[str]:
    """What share of a task's items was found in training text, with examples."""
    parts = [(f"in {result.shards}", result.in_shards)]
    if result.seen is not None:
        parts.append((f"seen by {result.checkpoint}, {result.next_index:,} samples", result.seen))
    judged = result.items - result.too_short
    return [
        f"contamination of {result.task}: items that share {N_WORDS} words in a row, of {judged:,} "
        f"({result.too_short:,} more are shorter)",
        *(
            f"  {overlap.items:>6,} ({overlap.share:.2%}; {overlap.gram_share:.2%} of sequences) "
            f"{where}; {overlap.text_bytes / 1e6:,.1f} MB in {overlap.time_s:.1f} s"
            for where, overlap in parts
        ),
        *(
            f"  e.g. item {each.item} in {each.source}, row {each.row} (which begins in "
            f"{each.document}): {each.words}"
            for each in result.in_shards.examples
        ),
        *(f"shards    {name}: root {root}" for name, root in result.roots.items()),
    ]


def heldout_card(result: HeldOut) -> list[str]:
    """A table of bits per byte: a line for each source, and one for all together."""
    head = ("held out", "documents", "tokens", "bytes", "model", "unigram", "gzip", "xz")
    scores = result.sources if len(result.sources) == 1 else (*result.sources, result.total)
    model = result.model
    without = [f"Nothing is held out of {', '.join(result.without)}."] if result.without else []
    return [
        f"heldout: {model['model']} ({model['parameters']:,} parameters); bits per byte, "
        "smaller is better",
        *_aligned([head, *map(_row, scores)]),
        f"The model is {abs(result.below_unigram):.1%} "
        f"{'below' if result.below_unigram >= 0 else 'ABOVE'} the unigram. It scores each document "
        f"from its BOS, context {result.context:,}; gzip -9 and xz -9e see "
        f"{result.compressors_see}.",
        *without,
        f"weights sha256 {model['weights_sha256']}, {model['dtype']} on {model['device']}, "
        f"{result.time_s:.1f} s",
    ]


def _provenance(model: Mapping[str, object], time_s: float) -> list[str]:
    return [
        f"weights   sha256 {model['weights_sha256']}, {model['dtype']} on {model['device']}",
        f"tokenizer {model['tokenizer']}, sha256 {model['tokenizer_sha256']}",
        f"time      {time_s:.1f} s",
    ]


def _row(score: SourceScore) -> tuple[str, ...]:
    counts = (f"{number:,}" for number in (score.documents, score.tokens, score.bytes))
    rates = (f"{rate:.3f}" for rate in (score.model, score.unigram, score.gzip, score.xz))
    return (score.source, *counts, *rates)


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Rows in columns: the first to the left, the others to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _figure(value: float | None) -> str:
    if value is None:
        return "none (nothing counted, or beyond any number)"
    return f"{value:,.4f}" if value < 1e9 else f"{value:.4e}"


def _error(value: float | None) -> str:
    return "" if value is None else f" ± {_figure(value)}"
