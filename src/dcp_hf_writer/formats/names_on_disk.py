"""How the files of a checkpoint are called.

Readers outside this package know all of these names, so none can change.
"""

METADATA_NAME = ".metadata"
"""DCP's own file; torch fixes its name."""
MANIFEST_NAME = "dcp-hf.json"
"""The manifest, which is published last."""

SUFFIX = ".safetensors"
"""End of the names of files that hold weights in the HuggingFace format."""
INDEX_SUFFIX = ".safetensors.index.json"
"""End of the names of files that say which file holds which tensor."""
SINGLE_NAME = "model.safetensors"
"""The one file of weights, where one holds them all."""
INDEX_NAME = "model.safetensors.index.json"
"""The index, where several files hold the weights."""
CONFIG_NAME = "config.json"
"""The config of a HuggingFace model."""
