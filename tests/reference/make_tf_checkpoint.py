"""Write tests/data/tf_checkpoint: a tiny GPT-2 as TensorFlow stores it, and the numbers in it.

    python tests/reference/make_tf_checkpoint.py        # needs tensorflow (the CPU package does)

`saver/` is written by tf.compat.v1.train.Saver from variables named as in OpenAI's model.py, which
is how OpenAI's own files came to be; `sharded/` holds the same tensors in two data files, by the
operations a distributed job uses. `expected.safetensors` has the numbers under TensorFlow's names,
written by the safetensors library.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

HPARAMS = {"n_vocab": 61, "n_ctx": 32, "n_embd": 16, "n_head": 4, "n_layer": 2}
FOLDER = Path(__file__).parents[1] / "data" / "tf_checkpoint"


def variables(hparams: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """GPT-2's variables under OpenAI's names: random float32 numbers, of OpenAI's shapes."""
    v, t, c = hparams["n_vocab"], hparams["n_ctx"], hparams["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {"wte": (v, c), "wpe": (t, c), "ln_f/g": (c,)}
    shapes["ln_f/b"] = (c,)
    for layer in range(hparams["n_layer"]):
        for name, shape in {
            "ln_1/g": (c,),
            "ln_1/b": (c,),
            "attn/c_attn/w": (1, c, 3 * c),
            "attn/c_attn/b": (3 * c,),
            "attn/c_proj/w": (1, c, c),
            "attn/c_proj/b": (c,),
            "ln_2/g": (c,),
            "ln_2/b": (c,),
            "mlp/c_fc/w": (1, c, 4 * c),
            "mlp/c_fc/b": (4 * c,),
            "mlp/c_proj/w": (1, 4 * c, c),
            "mlp/c_proj/b": (c,),
        }.items():
            shapes[f"h{layer}/{name}"] = shape
    rng = np.random.default_rng(seed)
    return {
        f"model/{name}": rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        for name, shape in shapes.items()
    }


def write_saver(folder: Path, hparams: dict[str, int], arrays: dict[str, np.ndarray]) -> None:
    """An OpenAI folder: hparams.json, checkpoint, model.ckpt.{index,data-00000-of-00001}."""
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        made = []
        for name, array in arrays.items():
            *scopes, last = name.split("/")
            with tf.compat.v1.variable_scope("/".join(scopes)):
                placeholder = tf.compat.v1.placeholder(tf.float32, array.shape)
                variable = tf.compat.v1.get_variable(last, array.shape, use_resource=False)
            session.run(variable.assign(placeholder), {placeholder: array})
            made.append(variable)
        saver = tf.compat.v1.train.Saver(made)
        saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)
    # As on OpenAI's store: a name beside the file, not a path on the machine that wrote it.
    name = "model.ckpt"
    (folder / "checkpoint").write_text(
        f'model_checkpoint_path: "{name}"\nall_model_checkpoint_paths: "{name}"\n'
    )
    (folder / "hparams.json").write_text(json.dumps(hparams, indent=2) + "\n")


def write_sharded(folder: Path, hparams: dict[str, int], arrays: dict[str, np.ndarray]) -> None:
    """The same with the tensors spread over two data files."""
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    names, parts = sorted(arrays), []
    for i in range(2):
        parts.append(str(folder / f"part-{i}"))
        chosen = names[i::2]
        tf.raw_ops.SaveV2(
            prefix=parts[-1],
            tensor_names=chosen,
            shape_and_slices=[""] * len(chosen),
            tensors=[arrays[name] for name in chosen],
        )
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=parts, destination_prefix=str(folder / "model.ckpt")
    )
    (folder / "hparams.json").write_text(json.dumps(hparams, indent=2) + "\n")


def main() -> None:
    from safetensors.numpy import save_file

    shutil.rmtree(FOLDER, ignore_errors=True)
    arrays = variables(HPARAMS)
    write_saver(FOLDER / "saver", HPARAMS, arrays)
    write_sharded(FOLDER / "sharded", HPARAMS, arrays)
    save_file(arrays, FOLDER / "expected.safetensors")


if __name__ == "__main__":
    main()
