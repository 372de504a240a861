"""UPerNet with TinyMIM-Small on ADE20K (48.4 mIoU in the paper).

The release has a config for B alone; this is that recipe with the smaller encoder, which is our choice. The head is
as large as B's and takes most of the time (docs/segmentation_networks.md); with segment.channels=384 a step needs a
third of the products.
"""

from configs import segment_b


def get_config():
    config = segment_b.get_config()
    config.model.variant = "S"
    return config
