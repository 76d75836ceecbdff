"""Model folders and weights files: what they hold, and how networks come out of them."""

from hi3d_jax.pretrained.bundles import PACKAGED, packaged, save_bundle, stage_folders
from hi3d_jax.pretrained.configs import config_from_dict, config_to_dict
from hi3d_jax.pretrained.folders import (
    NetworkWeights,
    check_weights,
    from_pretrained,
    read_config,
    read_networks,
    resolve,
    save_pretrained,
    weights_folder,
    write_model_folder,
)
from hi3d_jax.pretrained.networks import (
    abstract_network,
    config_class,
    network_class,
    parameters,
    with_parameters,
)
from hi3d_jax.pretrained.safetensors_files import (
    PretrainedError,
    Tensors,
    open_safetensors,
    open_shards,
    write_safetensors,
)

__all__ = [
    "PACKAGED",
    "NetworkWeights",
    "PretrainedError",
    "Tensors",
    "abstract_network",
    "check_weights",
    "config_class",
    "config_from_dict",
    "config_to_dict",
    "from_pretrained",
    "network_class",
    "open_safetensors",
    "open_shards",
    "packaged",
    "parameters",
    "read_config",
    "read_networks",
    "resolve",
    "save_bundle",
    "save_pretrained",
    "stage_folders",
    "weights_folder",
    "with_parameters",
    "write_model_folder",
    "write_safetensors",
]
