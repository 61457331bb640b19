"""The names that PEFT gives its files and tensors."""

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
NOTE = "INFERENCE_ONLY.txt"  # beside an adapter that would train otherwise in PEFT
PREFIX = "base_model.model."  # of a site's tensors: PREFIX + module + "." + tensor
SHARED = "base_model."  # of the bases that all sites share
