"""A run of ours -> a Hugging Face folder, and back; published only if ids and logits agree.

What is written goes into a temporary folder, is read back from there by the other side, and gets
its name when both have read the same ids and computed the same logits.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from model.config import count_params
from pipeline.inputs.listing import embedded_inputs
from pipeline.inputs.sources import find
from pipeline.text.json_tokenizer import load_tokenizer
from pipeline.text.tokenizer import Tokenizer
from shards.files import fsync_folder, publish_bytes
from shards.format import TOKENIZER_JSON
from tools.conversion.card import Export, model_card
from tools.conversion.llama_cpp import check_convertible, to_gguf
from tools.errors import ConversionError
from tools.models.hf_folder import (
    is_hub_folder,
    is_own_architecture,
    read_model,
    read_tokenizer,
    write_folder,
)
from tools.models.llama import is_llama
from tools.models.loading import LoadedModel, ModelSpec, check_fit, has_conversed, load
from tools.models.tokenizers import Vocabulary, filled_up
from trainer.checkpoint.runs import is_checkpoint, newest_checkpoint
from trainer.checkpoint.storage import no_single_process_warning, read_record, save
from trainer.config.config import RunConfig, save_config
from trainer.distributed.world import World

Format = Literal["hf", "summer"]
ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))
_LOCAL: Final = {"dtype": torch.float32, "local_files_only": True}
_REAL_TEXTS, _REAL_TEXT_BYTES = 40, 50_000  # of each source, and of each text
_PROBES: Final = (
    "The quick brown fox, 3.14 times.\n\n  def f(x):\n\treturn x  # twice\n",
    " a leading space, a trailing one ",
    "naïve façade, 東京, Ελλάδα, 😀, \u2028 and \x00",
)
_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ROUNDING: Final = {"bf16": 2**-4, "fp16": 2**-7, "fp32": 1e-4}
"""Most that logits may move, of the largest or of 1: a weight keeps eight bits, or eleven."""


class Converted(NamedTuple):
    """What was made, of which model, and how far its logits are from the original's."""

    made: Format
    source: str
    parameters: int
    largest_difference: float  # between us and transformers, on the weights that were written
    limit: float
    dtype: str = "fp32"
    rounding: float = 0.0  # of the logits, by writing the weights in `dtype`


def convert(
    source: Path,
    target: Path,
    wanted: Format | None = None,
    export: Mapping[str, Any] | None = None,
    gguf: str = "",
) -> Converted:
    """Convert a run (or one of its checkpoints) or a Hugging Face folder into the other kind.

    `export` holds fields of Export. ConversionError where the model has no equal on the other
    side, or where the logits differ.
    """
    if not source.is_dir():
        raise ConversionError(f"{source}: no such folder: name a run or a Hugging Face folder")
    is_hub = is_hub_folder(source)
    if wanted not in (None, "summer" if is_hub else "hf"):
        raise ConversionError(
            f"{source} is of format {wanted!r} already: leave --format out, or name another folder"
        )
    if is_hub and (given := [*(export or {}), *(["gguf"] if gguf else [])]):
        raise ConversionError(f"{source} becomes a run, in fp32: leave --{given[0]} out")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists: give --to a new folder")
    _transformers()  # before work starts, not after it
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.converting-", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        if is_hub:
            converted = _to_summer(source, folder)
        else:
            converted = _to_hugging_face(source, folder, Export(**(export or {})), gguf)
        folder.rename(target)
        fsync_folder(target.parent)
    return converted


def check_folder(folder: Path, gguf: str = "") -> Converted:
    """What a Hugging Face folder holds, if both sides read it alike; else ConversionError.

    A GGUF file is added to it if one is wanted.
    """
    if not is_hub_folder(folder):
        raise ConversionError(f"{folder} is no Hugging Face folder: name a new one with --to")
    written = load(ModelSpec(hf=folder, device="cpu", dtype="fp32"))
    if gguf:
        check_convertible(is_llama(written.model.config))
    difference, limit = _compare(folder, written, _theirs(folder))
    if gguf:
        to_gguf(folder, gguf, written)
    return Converted("hf", str(folder), count_params(written.model.config), difference, limit)


def _to_summer(source: Path, folder: Path) -> Converted:
    """A run with one checkpoint, at step 0: `--run` reads it and `init_from` trains on from it."""
    config, weights = read_model(source)
    tokenizer = read_tokenizer(source)
    vocabulary = filled_up(Vocabulary.of(tokenizer), config.vocab_size)
    check_fit(str(source), config, weights, vocabulary)
    if (source / TOKENIZER_JSON).is_file():
        _compare_ids(source, tokenizer)
    save_config(folder, RunConfig(preset="converted", model=config))
    for name, data in tokenizer.files().items():
        publish_bytes(folder / name, data)
    record = {"step": 0, "next_index": 0, "converted_from": source.name}
    with no_single_process_warning():
        save(folder, {f"model.{name}": weight for name, weight in weights.items()}, record, ALONE)
    made = load(ModelSpec(checkpoint=newest_checkpoint(folder), device="cpu", dtype="fp32"))
    difference, limit = _compare(source, made, _theirs(source))
    return Converted("summer", str(source), count_params(config), difference, limit)


def _theirs(folder: Path) -> Any:
    """The folder's model as transformers computes it, in fp32."""
    theirs = _transformers().AutoModelForCausalLM
    if is_own_architecture(folder):  # our own code: the folder's copy might be anybody's
        from tools.models.modeling_summerlm import SummerLMForCausalLM as theirs  # noqa: N813
    return theirs.from_pretrained(folder, **_LOCAL)


def _to_hugging_face(source: Path, folder: Path, export: Export, gguf: str) -> Converted:
    """A folder that both sides read alike, and whose logits are the run's as far as `dtype` goes.

    Both sides are compared on the weights that were written, so that only arithmetic is between
    them; what rounding the weights does to the logits is measured apart, with a bound of its own.
    """
    named = {"checkpoint" if is_checkpoint(source) else "run": source}
    loaded = load(ModelSpec(**named, device="cpu", dtype="fp32"))
    checkpoint, config = loaded.checkpoint or source, loaded.model.config
    if gguf:
        check_convertible(is_llama(config))
    tokenizer, record = load_tokenizer(checkpoint.resolve().parents[1]), read_record(checkpoint)
    weights, dtype = loaded.model.state_dict(), _DTYPES[export.dtype]
    write_folder(folder, config, weights, tokenizer, dtype, chat=has_conversed(checkpoint))
    card = model_card(checkpoint, loaded, record, export)
    publish_bytes(folder / "README.md", card.encode())
    _compare_ids(folder, tokenizer)
    written = load(ModelSpec(hf=folder, device="cpu", dtype="fp32"))
    theirs = _transformers().AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=is_own_architecture(folder), **_LOCAL
    )  # code just written
    difference, limit = _compare(source, written, theirs)
    tokens = _probe(loaded)
    with torch.inference_mode():
        original = loaded.model.logits(tokens)
        moved = (written.model.logits(tokens) - original).abs().max().item()
    bound = _ROUNDING[export.dtype] * max(1.0, original.abs().max().item())
    if not moved <= bound:
        raise ConversionError(
            f"{source}: in {export.dtype} the logits move by {moved:.2g} (limit {bound:.2g}), so"
            " nothing was kept: give --dtype fp32"
        )
    if gguf:
        to_gguf(folder, gguf, written)
    parameters = count_params(config)
    return Converted("hf", loaded.name, parameters, difference, limit, export.dtype, moved)


def _compare_ids(folder: Path, tokenizer: Tokenizer) -> None:
    """ConversionError unless transformers gives our ids for texts of every kind."""
    theirs = Vocabulary.of_tokenizer_json(folder)
    for text in (*_PROBES, *_real_texts()):
        if theirs.encode(text) != tokenizer.encode(text):
            raise ConversionError(
                f"{folder}: transformers reads other tokens from its {TOKENIZER_JSON} than"
                f" shards have by its {tokenizer.file}, for {text[:60]!r}, so nothing was kept: put"
                " the two files back that belong together"
            )


def _real_texts() -> Iterator[str]:
    """About a megabyte of this interpreter's library, prose and code."""
    for inputs in map(embedded_inputs, map(find, ("python-docs", "python-code"))):
        for file in inputs.files[:_REAL_TEXTS]:
            with inputs.open(file.path) as opened:
                yield opened.read(_REAL_TEXT_BYTES).decode(errors="ignore")


def _probe(loaded: LoadedModel) -> Tensor:
    """[2, T] random tokens and real text, as long as the model's context up to 512."""
    length = min(512, loaded.trained_context)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, loaded.model.config.vocab_size, (length,), generator=generator)
    read = torch.tensor(list(loaded.vocabulary.encode(next(_real_texts())))[:length])
    return torch.stack([drawn, read])


def _compare(source: Path, ours: LoadedModel, theirs: Any) -> tuple[float, float]:
    """How far our logits are from those of transformers' model, and how far they may be.

    The limit is 1e-4, or 1e-4 of the largest logit where that is above 1. ConversionError beyond.
    """
    tokens = _probe(ours)
    with torch.inference_mode():
        expected = theirs.eval()(tokens).logits
        difference = (ours.model.logits(tokens) - expected).abs().max().item()
    limit = 1e-4 * max(1.0, expected.abs().max().item())
    if not difference <= limit:  # so that NaN fails too
        raise ConversionError(
            f"{source}: the converted model's logits differ by {difference:.2g} (limit"
            f" {limit:.2g}), so nothing was kept: this is a bug of ours, please report it with the"
            " folder's config.json"
        )
    return difference, limit


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConversionError(
            "nothing is converted unchecked, and comparing the logits needs transformers:"
            " pip install 'summerlm[hf]'"
        ) from error
    hub: Any = transformers
    hub.utils.logging.set_verbosity_error()
    hub.utils.logging.disable_progress_bar()
    return hub
