"""A folder as Hugging Face lays it out: config.json, safetensors, a tokenizer.

Its model is one of the Llama family, or one of our own architecture, whose code
(tools/models/modeling_summerlm.py and model/) is copied next to its weights; that copy is never
run from here. Weights are read from safetensors alone: a pickle can run code. The tokenizer is the
SentencePiece file where there is one, else tokenizer.json.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import model
from model.config import ModelConfig
from pipeline.errors import TokenizerError
from pipeline.text.json_tokenizer import load_tokenizer
from pipeline.text.tokenizer import Tokenizer, extend
from shards.files import publish_bytes, publish_json
from shards.format import TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_JSON, tokenizer_path
from shards.versions import VERSION, WRITER_KEY, writer_of
from tools.errors import ConversionError
from tools.models.llama import (
    config_from_llama,
    config_to_llama,
    is_llama,
    weights_from_llama,
    weights_to_llama,
)
from tools.models.tokenizers import Message, Vocabulary, filled_up, tokenizer_files
from trainer.config.config import from_stored
from trainer.errors import ConfigError

CONFIG: Final = "config.json"
MODELING: Final = "modeling_summerlm.py"
OWN: Final = "summerlm"  # our architecture's model_type
_THEIRS: Final = frozenset((
    "architectures", "auto_map", "model_type", "bos_token_id", "eos_token_id", "pad_token_id",
    "dtype", "torch_dtype", "transformers_version", "tie_word_embeddings", "head_dim", "use_cache",
    "id2label", "label2id", "problem_type", "return_dict", "is_encoder_decoder",
    "output_attentions", "output_hidden_states", "chunk_size_feed_forward",
))  # fmt: skip
"""Keys of a config.json that are the library's, or are for it: none changes what is computed."""
_NAME: Final = re.compile(r"[\w-][\w.-]*\.safetensors")
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_FILE_BYTES: Final = 5_000_000_000
_TRANSFORMERS: Final = "4.56.0"
"""The release whose layout is written; the oldest that is tested reads it, and newer ones do."""


def is_hub_folder(folder: Path) -> bool:
    """Whether a config.json is there that names a Hugging Face architecture."""
    return (folder / CONFIG).is_file() and "model_type" in _read_json(folder / CONFIG)


def is_own_architecture(folder: Path) -> bool:
    """Whether the folder's model is one that only our own code computes."""
    return _read_json(folder / CONFIG).get("model_type") == OWN


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, Tensor], Vocabulary]:
    """Shape, weights by our names in fp32, and vocabulary; ConversionError where it is no Llama."""
    config, weights = read_model(folder)
    return config, weights, read_vocabulary(folder, config.vocab_size)


def read_model(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Shape and weights by our names, fp32."""
    try:
        described = _read_json(folder / CONFIG)
        is_own = described.get("model_type") == OWN
        config = _config_from_own(described, folder) if is_own else config_from_llama(described)
        theirs: dict[str, Tensor] = {}
        for path in _weight_files(folder):
            theirs |= load_file(path)
        if is_own:
            return config, {name: tensor.float() for name, tensor in theirs.items()}
        return config, weights_from_llama(config, theirs)
    except SafetensorError as error:
        raise ConversionError(f"{folder}: damaged weights ({error}): fetch it again") from error
    except ConversionError as error:
        raise ConversionError(f"{folder}: {error}") from error


def read_vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """The folder's tokenizer, filled up with ids that stand for nothing where the model has more.

    ConversionError if there is none.
    """
    has_json = (folder / TOKENIZER_JSON).is_file()
    if (folder / TOKENIZER).is_file() or not has_json:
        vocabulary = Vocabulary.of(read_tokenizer(folder))
    if has_json and not ((folder / TOKENIZER).is_file() and len(vocabulary) > _last_added(folder)):
        vocabulary = Vocabulary.of_tokenizer_json(folder)
    if vocabulary.chat is None and has_json and _has_chat_template(folder):
        vocabulary = replace(vocabulary, chat=partial(_chat_of_json, folder))
    vocabulary = replace(vocabulary, end_ids=_end_ids(folder))
    return filled_up(vocabulary, vocab_size)


def _has_chat_template(folder: Path) -> bool:
    config = folder / TOKENIZER_CONFIG
    if (folder / "chat_template.jinja").is_file():
        return True
    return config.is_file() and bool(_read_json(config).get("chat_template"))


def _chat_of_json(folder: Path, messages: Sequence[Message]) -> list[int]:
    """A conversation by the folder's own template; transformers is imported when one is asked."""
    chat = Vocabulary.of_tokenizer_json(folder).chat
    if chat is None:
        raise ConversionError(f"{folder}: its chat template is not among what transformers reads")
    return chat(messages)


def _last_added(folder: Path) -> int:
    """The last token that a tokenizer.json adds to its model, as chat fine-tunes do; else -1."""
    added = _read_json(folder / TOKENIZER_JSON).get("added_tokens")
    known = [token.get("id") for token in added or () if isinstance(token, dict)]
    return max((number for number in known if isinstance(number, int)), default=-1)


def _end_ids(folder: Path) -> frozenset[int]:
    """All ids that end a text, as the folder's generation_config.json has them."""
    path = folder / "generation_config.json"
    found = _read_json(path).get("eos_token_id") if path.is_file() else None
    ids = found if isinstance(found, list) else [found]
    return frozenset(number for number in ids if isinstance(number, int))


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.model, its user-defined symbols made control pieces if it has any; or
    else its tokenizer.json, as shards are made with it."""
    path = tokenizer_path(folder)
    if not path.is_file():
        raise ConversionError(
            f"{folder}: neither {TOKENIZER} nor {TOKENIZER_JSON} is there: add the tokenizer"
        )
    try:
        if path.name == TOKENIZER_JSON:
            return load_tokenizer(path)
        model = path.read_bytes()
        with contextlib.suppress(TokenizerError):
            return Tokenizer(model, folder.name)
        return Tokenizer(extend(model, ()), folder.name)
    except TokenizerError as error:
        raise ConversionError(f"{path}: {error}") from error


def write_folder(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype = torch.float32,
    *,
    chat: bool = True,
) -> None:
    """Write a folder that transformers loads: a LlamaForCausalLM, or with our own code.

    `chat` gives it the template of conversations, where the tokenizer has the markers.
    ConversionError for a weight that `dtype` cannot hold.
    """
    ends = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    if is_llama(config):
        described, theirs = config_to_llama(config), weights_to_llama(config, weights)
    else:
        described, theirs = _own_config(config), dict(weights)
        for name, code in model_code().items():
            publish_bytes(folder / name, code.encode())
    kind = str(dtype).removeprefix("torch.")
    written_by = {"transformers_version": _TRANSFORMERS, WRITER_KEY: VERSION}
    publish_json(folder / CONFIG, {**described, **ends, "dtype": kind, **written_by})
    drawn = Vocabulary.of(tokenizer).may_be_drawn(config.vocab_size)
    no_text = [number for number, may_be in enumerate(drawn) if not may_be]
    described = {**ends, "suppress_tokens": no_text, "transformers_version": _TRANSFORMERS}
    publish_json(folder / "generation_config.json", described)
    for name, data in tokenizer_files(tokenizer, config.seq_len, chat=chat).items():
        publish_bytes(folder / name, data)
    theirs = {name: weight.to(dtype).contiguous() for name, weight in theirs.items()}
    if lost := [name for name, weight in theirs.items() if not weight.isfinite().all()]:
        raise ConversionError(f"{lost[0]} is beyond what {kind} can hold: give --dtype bf16")
    save_torch_state_dict(theirs, folder, max_shard_size=_FILE_BYTES)
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def model_code() -> dict[str, str]:
    """The files that compute our architecture, by name, as they lie together in one folder.

    transformers 4 fetches only those that the first file names, so it is made to name all.
    """
    parts = sorted(Path(model.__path__[0]).glob("[!_]*.py"))
    names_all = "\n" + "".join(f"from model.{path.stem} import __doc__ as _\n" for path in parts)
    files = {path.name: path.read_text("utf-8") for path in parts}
    files[MODELING] = Path(__file__).with_name(MODELING).read_text("utf-8") + names_all
    within = re.compile(r"^from model\.(\w+) import", re.MULTILINE)
    return {name: within.sub(r"from .\1 import", text) for name, text in files.items()}


def _own_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of our own architecture: our names, and where its code is."""
    module = MODELING.removesuffix(".py")
    return {
        "architectures": ["SummerLMForCausalLM"],
        "model_type": OWN,
        "auto_map": {
            "AutoConfig": f"{module}.SummerLMConfig",
            "AutoModel": f"{module}.SummerLMModel",
            "AutoModelForCausalLM": f"{module}.SummerLMForCausalLM",
        },
        **asdict(config),
        "head_dim": config.head_dim,
        "tie_word_embeddings": config.tie_embeddings,
    }


def _config_from_own(described: Mapping[str, Any], folder: Path) -> ModelConfig:
    ours = {key: v for key, v in described.items() if key not in _THEIRS and key[:1] != "_"}
    ours.pop(WRITER_KEY, None)
    try:
        return from_stored(ModelConfig, ours, folder / CONFIG, writer_of(described), "model.")
    except ConfigError as error:
        raise ConversionError(
            f"config.json describes no model of summer-convert ({error}): fetch it again"
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if not (folder / _INDEX).is_file():
        raise ConversionError(
            f"no {_SINGLE} and no {_INDEX} there: only safetensors are read (a pickle can run code)"
        )
    index = _read_json(folder / _INDEX).get("weight_map")
    names = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else [""]
    if strange := [name for name in names if not _NAME.fullmatch(name)]:
        raise ConversionError(
            f"{_INDEX} names {strange[0]!r}, no file of the folder: fetch it again"
        )
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ConversionError(f"{absent[0]} is missing: the folder is incomplete, fetch it again")
    return [folder / name for name in names]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_bytes())  # a link in the Hub's cache
    except FileNotFoundError:
        raise ConversionError(
            f"no {path.name} there: name a folder with config.json, safetensors and a tokenizer"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConversionError(f"{path.name} is no JSON ({error}): fetch it again") from error
    if not isinstance(described, dict):
        raise ConversionError(f"{path.name} holds no JSON object: fetch it again")
    return described
