"""What users get wrong: the command as they type it, and what the one line of the answer must name.

The lists are grouped by user. The line must name the place, the key, the value and the remedy, in whatever sentence.
`test_mistakes` runs every case and adds the words that make the rest of the command right.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.commands.broken_files import (
    Given,
    bomb,
    config,
    file,
    linked_picture,
    nothing,
    pictures,
    png,
    query,
    row,
)


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        typed: the command as a shell reads it, without the ``mmemb`` before it.
        named: parts of the one line that answers it.
        given: prepares the folder in which the command runs.
    """

    typed: str
    named: tuple[str, ...]
    given: Given = nothing


def flag(words: str, *named: str) -> Mistake:
    """A flag of ``mmemb fit``."""
    return Mistake(f"fit {words}", named)


def setting(content: str | bytes, *named: str) -> Mistake:
    """A config of ``mmemb fit``."""
    return Mistake("fit --config given.yaml", named, config(content))


def data(given: Given, *named: str, words: str = "") -> Mistake:
    """A file that ``mmemb fit`` reads."""
    return Mistake(f"fit {words}", named, given)


SETTINGS: dict[str, Mistake] = {
    # Who trains: flags. The trained module and data are stand-ins that only take part in the reading of settings.
    "part misspelled": flag(
        "--model.selector conterfactual", "model.selector: ", "'conterfactual'", "'counterfactual'", "random"
    ),
    "part of another kind": flag("--model.selector embed_token", "'embed_token'", "is a pooler", "Registered: "),
    "argument of a part of another type": flag(
        "--model.selector=random --model.selector.seed=abc", "model.selector.seed", "int", "'abc'"
    ),
    "argument of a part misspelled": flag("--model.selector=random --model.selector.sed=4", "'sed'", "'seed'"),
    "argument of no part": flag("--model.selector.seed=3", "model.selector: ", "is abstract", "mmemb components"),
    "argument of a part out of range": flag(
        "--model.selector=counterfactual --model.selector.temperature=-1", "temperature", "-1.0", "give a"
    ),
    "class of no package": flag("--model.selector=none.Such", "'none.Such'", "cannot be imported", "PYTHONPATH"),
    "number in words": flag("--model.width=wide", "model.width", "int", "'wide'"),
    "flag misspelled": flag("--model.widht=3", "'--model.widht'", "'--model.width'"),
    "no such config": flag("--config=none.yaml", "no config file", "none.yaml"),
    "no such checkpoint": flag("--ckpt_path=none.ckpt", "none.ckpt: ", "--ckpt_path"),
    "help of a part misspelled": flag("--model.selector.help=conterfactual", "'counterfactual'"),
    "flag without its value": flag("--config", "--config", "one argument"),
    "short form: part misspelled": flag(
        "'--model.selector={randm: {seed: 4}}'", "model.selector: ", "'randm'", "'random'", "counterfactual"
    ),
    "short form: argument without its part": flag(
        "'--model.selector={seed: 4}'", "model.selector: ", "'seed'", "Registered: all, "
    ),
    "short form: argument misspelled": flag("'--model.selector={random: {sed: 1}}'", "'sed'", "'seed'"),
    "short form: number for arguments": flag("'--model.selector={random: 4}'", "'random'", "mapping", "got 4"),
    "short form: arguments not indented": flag(
        "'--model.controllers=[{threshold: null, token_share: 0.6}]'",
        *("model.controllers: ", "'threshold'", "'token_share'", "indent"),
    ),
    "short form: part of a list misspelled": flag(
        "'--model.controllers=[never, {thresold: {}}]'", "model.controllers: ", "'threshold'"
    ),
    "short form: optimizer misspelled": flag(
        "'--model.optimizer={AdmW: {lr: 1}}'", "optimizer", "'AdmW'", "'AdamW'", "SGD"
    ),
    "short form: argument of the optimizer of another type": flag(
        "'--model.optimizer={AdamW: {lr: fast}}'", "model.optimizer.lr", "float", "'fast'"
    ),
    "optimizer of another kind": flag(
        "--model.optimizer=torch.nn.Linear", "model.optimizer: ", "'torch.nn.Linear'", "Optimizer", "AdamW"
    ),
    "short form: optimizer of another kind": flag(
        "'--model.optimizer={torch.nn.Linear: {}}'", "model.optimizer: ", "'torch.nn.Linear'", "Optimizer"
    ),
    # Who trains: configs.
    "config: section misspelled": setting("modle: {width: 3}", "'modle.width'", "'model.width'"),
    "config: key misspelled": setting("trainer: {precison: bf16}", "'trainer.precison'", "'trainer.precision'"),
    "config: number in words": setting("trainer: {max_steps: many}", "trainer.max_steps", "int", "'many'"),
    "config: no such part": setting("model: {selector: nope}", "model.selector: ", "'nope'"),
    "config: number for a part": setting("model: {selector: 3}", "short name or class path", "Selector", "'3'"),
    "config: part of a list misspelled": setting(
        "model: {controllers: [never, thresold]}", "model.controllers: ", "'threshold'"
    ),
    "config: argument of a part of another type": setting(
        "model: {selector: {class_path: random, init_args: {seed: x}}}", "seed", "int", "'x'"
    ),
    "config: argument of a part misspelled": setting(
        "model: {selector: {class_path: random, init_args: {sed: 1}}}", "'sed'", "takes seed"
    ),
    "config: no such class": setting(
        "model: {selector: mmemb.components.selectors.random.Rndom}", "Rndom'", "cannot be imported"
    ),
    "config: no such class of torch": setting("model: {optimizer: torch.optim.AdmW}", "model.optimizer: ", "'AdmW'"),
    "config: optimizer misspelled": setting("model: {optimizer: AdmW}", "'AdmW'", "dotted path"),
    "config: argument of the optimizer of another type": setting(
        "model: {optimizer: {class_path: torch.optim.AdamW, init_args: {lr: fast}}}",
        *("model.optimizer.lr", "float", "'fast'"),
    ),
    "config: class of another kind": setting(
        "model: {selector: mmemb.components.controllers.never.Never}", "model.selector: ", "Selector"
    ),
    "config: not closed": setting("model: [a", "given.yaml, line 1", "YAML"),
    "config: colon too many": setting("a: 1\nb: :\n  - c: [", "given.yaml, line"),
    "config: a list": setting("- a\n- b", "given.yaml", "mapping", "list"),
    "config: empty": setting("", "given.yaml", "mapping", "NoneType"),
    "config: binary": setting(b"\xff\xfe\x00", "given.yaml", "YAML"),
    "checkpoint that is none": data(
        file("a.ckpt", b"not a checkpoint"), "a.ckpt", "cannot be read", words="--ckpt_path=a.ckpt"
    ),
}

TRAINING: dict[str, Mistake] = {
    # Who trains: settings of the real module and its data.
    "no such part": flag("--model.selector=rndom", "model.selector: ", "'rndom'", "'random'"),
    "no such part of a list": flag("--model.pool.workers=[metdata]", "model.pool.workers", "'metadata'"),
    "no such part far below": flag(
        "'--model.phases=[{objective: {joint: {infonce: {infnce: {temperature: 0.1}}}}}]'",
        *("model.phases.objective.infonce", "'infnce'", "'infonce'"),
    ),
    "no such argument far below": flag(
        "'--model.phases=[{objective: {joint: {infonce: {temprature: 0.1}}}}]'",
        *("model.phases.objective.infonce", "'temprature'", "'temperature'"),
    ),
    "number in words": flag("--data.batch_size=many", "data.batch_size", "int", "'many'"),
    "number in words far below": flag(
        "'--model.phases=[{objective: {joint: {chunk_size: few}}}]'",
        *("model.phases.objective.chunk_size", "int", "'few'"),
    ),
    "fewer processes than none": flag("--data.num_workers=-1", "data.num_workers", "-1", "give 0 or more"),
    "fewer steps than none": flag(
        "'--model.phases=[{objective: joint, warmup_steps: -5}]'", "warmup_steps", "-5", "give 0 or more"
    ),
    "no phase": flag("--model.phases=[]", "model.phases", "empty", "give at least one"),
    "phase on data that is not there": flag(
        "'--model.phases=[{objective: joint, data: contrl}]'", "contrl", "data.streams.contrl.sources"
    ),
    "rate below nothing": flag(
        "--model.optimizer=AdamW --model.optimizer.lr=-1", "model.optimizer", "learning rate", "-1"
    ),
    "batch that cannot be cut": flag("--data.sub_batch_size=3", "batch_size", "sub_batch_size", "3"),
    "no such config": flag("--config=none.yaml", "no config file", "none.yaml"),
    "no such pool": flag("--model.pool.path=none --model.pool.workers=[]", "none: ", "pool"),
    "no such model": flag("--model.backbone=transformers --model.backbone.init_args.model=none/at/all", "none/at/all"),
    "no such checkpoint": flag("--ckpt_path=none.ckpt", "none.ckpt", "--ckpt_path", "no such file"),
    "checkpoint by a word": flag("--ckpt_path=last", "last: ", "--ckpt_path", "no such file"),
    "no such strategy": flag("--trainer.strategy=fast", "trainer: ", "strategy", "fast"),
    "selector without a pool": flag("--model.pool=null", "model.selector", "model.pool", "null"),
    "controller that nothing fits": flag(
        "'--model.controllers=[never, threshold]' --data.validation=[]", "model.controllers", "threshold", "validation"
    ),
    # Who brings data: where it is.
    "file in place of sources": flag("--data.train=pairs.jsonl", "data.train", "list of sources", "{path: "),
    "no training data": flag("--data.train=[]", "train", "data.train"),
    "no such data": flag("'--data.train=[{path: none.jsonl}]'", "none.jsonl: ", "no such file"),
    "no such test data": flag("'--data.test=[{path: none.jsonl}]'", "none.jsonl: ", "no such file"),
    "source of no rows": flag(
        "'--data.train=[{path: pairs.jsonl, limit: 0}]'", "data.train, pairs.jsonl", "limit", "0", "give 1 or more"
    ),
    "source with a misspelled key": flag("'--data.train=[{paht: a.jsonl}]'", "data.train", "'paht'", "'path'"),
    "source with a number in words": flag(
        "'--data.train=[{path: a.jsonl, limit: few}]'", "data.train.limit", "int", "'few'"
    ),
    "stream with a name that is taken": flag(
        "'--data.streams={train: {sources: [{path: pairs.jsonl}]}}'", "data.streams.train", "data.train", "another"
    ),
    "one task in two test files": flag(
        "'--data.test=[{path: pairs.jsonl}, {path: pairs.jsonl}]'", "data.test", "'colour'", "pairs.jsonl", "name"
    ),
    # Who brings data: what is in it.
    "no rows": data(file("pairs.jsonl", ""), "pairs.jsonl: ", "no rows", "add rows"),
    "not JSON": data(file("pairs.jsonl", "query: a\n"), "pairs.jsonl", "line 1", "JSON"),
    "row without query": data(row("query"), "pairs.jsonl, line 3", "'query'", "missing"),
    "row without positive": data(row("positive"), "pairs.jsonl, line 3", "'positive'", "missing"),
    "row with a misspelled key": data(row("query", {"txt": "a"}), "pairs.jsonl, line 3", "query", "txt"),
    "no such picture": data(
        query(image="pictures/none.png"), "pairs.jsonl, line 3", "query.image", "none.png", "does not exist"
    ),
    "picture outside its root": data(
        query(image="../elsewhere.png"), "pairs.jsonl, line 3", "query.image", "outside its root", "image_root"
    ),
    "picture outside by an absolute path": data(query(image="/etc/hostname"), "/etc/hostname", "outside its root"),
    "picture outside by a link": data(linked_picture, "pictures/red.png", "outside its root"),
    "picture that is none": data(pictures(b"no picture"), "picture ", ".png: ", "cannot be read", "remove its row"),
    "picture that is none in a loader process": data(
        pictures(b"no picture"), "picture ", ".png: ", "cannot be read", words="--data.num_workers=1"
    ),
    "picture cut short in its header": data(
        pictures(b"\x89PNG\r\n\x1a\n\x00\x00"), "picture ", ".png: ", "cannot be read", "remove its row"
    ),
    "picture cut short in its content": data(
        pictures(png(64, 64)[:60]), "picture ", ".png: ", "cannot be read", "remove its row"
    ),
    "picture bomb": data(pictures(bomb(40_000, 2_000)), "picture ", "40000 x 2000 pixels", "shrink the picture"),
    "larger picture bomb": data(pictures(bomb(90_000, 90_000)), "picture ", "50,000,000 pixels", "shrink the picture"),
    "picture of one line": data(pictures(png(1, 400)), "picture ", "1 x 400 pixels", "200 times", "remove its row"),
}

EMBEDDING: dict[str, Mistake] = {
    # Who embeds.
    "wider than the model": Mistake("embed --input pictures --dim 7000", ("dim", "7000")),
    "no budget": Mistake("embed --input pictures --budget 0", ("--budget", "0")),
    "limit below nothing": Mistake("embed --input pictures --limit -1", ("--limit", "-1", "1 or more")),
    "index of another ending": Mistake("embed --input pictures --output a.txt", ("a name that ends", ".parquet")),
    "no such input": Mistake("embed --input none", ("none",)),
    "no such model": Mistake("embed --input pictures --checkpoint none", ("none",)),
    "no such choice": Mistake("embed --input pictures --reason sometimes", ("reason", "'auto', 'always', 'never'")),
    "option misspelled": Mistake("embed --input pictures --inputs x", ("'--inputs'", "'--input'")),
    "no such device": Mistake("embed --input pictures --device gpu", ("device", "'gpu'")),
    "folder in place of the index": Mistake(
        "embed --input pictures --output deep.parquet", ("--output", "deep.parquet", "folder")
    ),
    "empty folder": Mistake("embed --input empty", ("empty", "nothing to embed")),
    "picture that is none": Mistake("embed --input broken", ("broken.png",)),
    "row with a misspelled key": Mistake("embed --input rows.jsonl", ("rows.jsonl, line 1",)),
    "picture outside its root": Mistake("embed --input out.jsonl", ("outside",)),
    # Who searches.
    "nothing to search for": Mistake("search", ("nothing to search for",)),
    "no results asked for": Mistake("search --query a --top 0", ("--top", "0")),
    "index does not exist": Mistake("search --query a", ("all.parquet", "index does not exist", "mmemb embed")),
    "index that is none": Mistake("search --query a --index bad.parquet", ("bad.parquet", "Parquet")),
    "no such picture": Mistake("search --image none.png --index bad.parquet", ("no picture", "none.png")),
}

RATIONALES: dict[str, Mistake] = {
    # Who makes rationales.
    "scores before candidates": Mistake("rationales score", ("mmemb rationales generate",)),
    "limit in words": Mistake("rationales show --limit few", ("--limit",)),
    "no workers": Mistake("rationales generate --model.pool.workers=[]", ("model.pool.workers", "empty")),
    "no evaluator": Mistake("rationales score --model.pool.evaluator=null", ("model.pool.evaluator", "missing")),
    "no pool": Mistake("rationales generate --model.pool=null", ("model.pool",)),
    "worker misspelled": Mistake("rationales generate --model.pool.workers=[metdata]", ("'metadata'",)),
    "no such data": Mistake("rationales generate '--data.train=[{path: none.jsonl}]'", ("none.jsonl",)),
    "no such action": Mistake("rationales make", ("'make'",)),
}

PLAIN: dict[str, Mistake] = {
    # Commands that need no settings, and commands without those they need.
    "no such command": Mistake("train", ("'train'", "fit, ")),
    "command misspelled": Mistake("componets", ("'componets'", "'components'", "fit, ")),
    "no such kind of part": Mistake("components --kind sorter", ("'sorter'", "backbone", "pooler", "selector")),
    "rationales without settings": Mistake("rationales generate", ("--config", "recipes/r1.yaml")),
    "no such split": Mistake("data show --split tset", ("'tset'",)),
    "no such task": Mistake("data show --task nme", ("'nme'",)),
    "no rows to show": Mistake("data show --rows 0", ("rows", "0", "give 1 or more")),
    "rows in words": Mistake("data show --rows few", ("rows", "int", "'few'")),
    "no such action on data": Mistake("data draw", ("mmemb data show",)),
    "no action on data": Mistake("data", ("mmemb data show",)),
}

GROUPS: dict[str, dict[str, Mistake]] = {
    "settings": SETTINGS,
    "training": TRAINING,
    "embedding": EMBEDDING,
    "rationales": RATIONALES,
    "plain": PLAIN,
}
