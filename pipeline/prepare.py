"""One source, from text to a finished folder of shards.

    prepare(request, executor, watch)

 1. The listing: local files, or the Hub's, whose revision is pinned to a commit.      inputs, hub
 2. The plan: files cut into parts, parts filled into units; `units.json`, first writer wins.  units
 3. A sample is read and encoded: it shows a wrong column or a damaged file before any work starts
    and gives the estimate (tokens, disk, hours); without room on the disk nothing begins.  estimate
 4. Each unit, by any worker, in any order:                                              run_unit
    read -> records -> documents -> ids -> rows -> shards -> receipt.
    The receipt is the commit. A unit without one is done again, from the beginning.
 5. With all receipts there, whoever notices writes the manifest: from now on the source exists.

Nothing is kept anywhere else: the same command, started again after any end, does what is missing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np

from pipeline.chat import Template
from pipeline.documents import DocumentMaker, Documents
from pipeline.encode import Encoder, encode_documents, make_encoder
from pipeline.errors import PrepareError
from pipeline.inputs import Inputs
from pipeline.pack import Packer
from pipeline.reading import PartReader
from pipeline.sources import Source
from pipeline.tokenizer import Tokenizer
from pipeline.units import UNIT_BYTES, Plan, make_plan, publish_plan, read_plan
from shards.errors import ShardError
from shards.files import create_exclusively, remove_stale_temporaries, sha256_file
from shards.format import TOKENIZER, Facts, Manifest, Receipt, token_dtype, unit_name
from shards.reader import read_receipt
from shards.writer import ShardWriter, write_manifest

SPLITS: Final = ("train", "val")
