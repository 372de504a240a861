"""UPerNet with TinyMIM-Tiny on ADE20K (44.0 mIoU in the paper).

The release has a config for B alone; this is that recipe with the smaller encoder, which is our choice. The head is as
large as B's and takes nearly all of the time (docs/segmentation_networks.md).
"""

from configs import segment_b


def get_config():
    config = segment_b.get_config()
    config.model.variant = "Ti"
    return config
