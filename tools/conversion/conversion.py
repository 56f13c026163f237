"""A run of ours -> a Hugging Face folder, and back; published only if ids and logits agree.

What is written goes into a temporary folder, is read back from there by the other side, and gets
its name when both have read the same ids and computed the same logits.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Literal, NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData

from model.config import count_params
from pipeline.inputs.listing import embedded_inputs
from pipeline.inputs.sources import find
from pipeline.text.json_tokenizer import load_tokenizer
from pipeline.text.tokenizer import Tokenizer
from shards.files import fsync_folder, publish_bytes
from shards.format import TOKENIZER_JSON
from shards.versions import VERSION
from tools.errors import ConversionError
from tools.models.hf_folder import (
    is_hub_folder,
    is_own_architecture,
    read_model,
    read_tokenizer,
    write_folder,
)
from tools.models.llama import is_llama
from tools.models.loading import LoadedModel, ModelSpec, check_fit, load
from tools.models.tokenizers import Vocabulary, filled_up
from trainer.checkpoint.runs import EVALUATIONS, is_checkpoint, newest_checkpoint
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
_CARD: Final = Path(__file__).with_name("model_card.jinja")


class Converted(NamedTuple):
    """What was made, of which model, and how far its logits are from the original's."""

    made: Format
    source: str
    parameters: int
    largest_difference: float
    limit: float


def convert(source: Path, target: Path, wanted: Format | None = None) -> Converted:
    """Convert a run (or one of its checkpoints) or a Hugging Face folder into the other kind.

    ConversionError where the model has no equal on the other side, or where the logits differ.
    """
    is_hub = is_hub_folder(source)
    if wanted not in (None, "summer" if is_hub else "hf"):
        raise ConversionError(
            f"{source} is of format {wanted!r} already: leave --format out, or name another folder"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConversionError(f"{target} exists: give --to a new folder")
    _transformers()  # before work starts, not after it
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}.converting-", dir=target.parent) as temporary:
        folder = Path(temporary) / target.name
        folder.mkdir()
        converted = (_to_summer if is_hub else _to_hugging_face)(source, folder)
        if not converted.largest_difference <= converted.limit:  # so that NaN fails too
            raise ConversionError(
                f"{source}: the converted model's logits differ by"
                f" {converted.largest_difference:.2g} (limit {converted.limit:.2g}), so nothing was"
                " kept: this is a bug of ours, please report it with the folder's config.json"
            )
        folder.rename(target)
        fsync_folder(target.parent)
    return converted


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
    theirs = _transformers().AutoModelForCausalLM
    if is_own_architecture(source):  # our own code: the folder's copy might be anybody's
        from tools.models.modeling_summerlm import SummerLMForCausalLM as theirs  # noqa: N813
    return _compare_logits("summer", str(source), made, theirs.from_pretrained(source, **_LOCAL))


def _to_hugging_face(source: Path, folder: Path) -> Converted:
    if not source.is_dir():
        raise ConversionError(f"{source}: no such folder: name a run or a Hugging Face folder")
    named = {"checkpoint" if is_checkpoint(source) else "run": source}
    loaded = load(ModelSpec(**named, device="cpu", dtype="fp32"))
    checkpoint = loaded.checkpoint or source
    tokenizer = load_tokenizer(checkpoint.resolve().parents[1])
    write_folder(folder, loaded.model.config, loaded.model.state_dict(), tokenizer)
    publish_bytes(folder / "README.md", model_card(checkpoint, loaded).encode())
    _compare_ids(folder, tokenizer)
    theirs = _transformers().AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=is_own_architecture(folder), **_LOCAL
    )  # code just written
    return _compare_logits("hf", loaded.name, loaded, theirs)


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


def _compare_logits(made: Format, source: str, ours: LoadedModel, theirs: Any) -> Converted:
    """How far our logits are from those of transformers' model.

    On random ids and on real text, as long as the model's context up to 512 ids. The limit is 1e-4,
    or 1e-4 of the largest logit where that is above 1.
    """
    length = min(512, ours.trained_context)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, ours.model.config.vocab_size, (length,), generator=generator)
    read = torch.tensor(list(ours.vocabulary.encode(next(_real_texts())))[:length])
    tokens = torch.stack([drawn, read])
    with torch.inference_mode():
        expected = theirs.eval()(tokens).logits
        difference = (ours.model.logits(tokens) - expected).abs().max().item()
    limit = 1e-4 * max(1.0, expected.abs().max().item())
    return Converted(made, source, count_params(ours.model.config), difference, limit)


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


def model_card(checkpoint: Path, loaded: LoadedModel) -> str:
    """The README.md of a folder with the checkpoint's weights: model_card.jinja, filled in."""
    run = checkpoint.resolve().parents[1]
    found = [*sorted((run / EVALUATIONS / checkpoint.name).glob("*.md")), *sorted(run.glob("*.md"))]
    cards = [path.read_text(encoding="utf-8").strip() for path in found]
    head = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["summerlm"]
    )
    card = ModelCard.from_template(
        head,
        template_path=str(_CARD),
        name=run.name,
        parameters=count_params(loaded.model.config),
        shape=asdict(loaded.model.config),
        code="" if is_llama(loaded.model.config) else ", trust_remote_code=True",
        loaded=loaded,
        record=read_record(checkpoint),
        exported_by=f"summerlm {VERSION}",
        results=[each.replace("## ", "### ", 1) for each in cards],
    )
    return str(card)
