"""Networks whose checkpoints are published, with the digests of their state dicts."""

from __future__ import annotations

from typing import Any

SIX_LEVELS, FIVE_LEVELS = (1, 1, 2, 2, 4, 4), (1, 1, 2, 3, 4)

# Arguments, then what the fixture `layout` says of the published state dict.
UNETS: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "ADM-256": (
        {
            "in_channels": 3,
            "model_channels": 256,
            "out_channels": 6,
            "channel_mult": SIX_LEVELS,
            "num_res_blocks": 2,
            "attention_downsample": (8, 16, 32),
            "num_classes": 1000,
            "num_head_channels": 64,
            "resblock_updown": True,
        },
        567,
        553_838_086,
        "e357403fc997eb00",
    ),
    "cond_ddpm_wsss CHAOS-128": (
        {
            "in_channels": 1,
            "model_channels": 128,
            "out_channels": 2,
            "channel_mult": FIVE_LEVELS,
            "num_res_blocks": 3,
            "attention_downsample": (8, 16),
            "num_classes": 1000,
        },
        533,
        125_575_682,
        "58342eb67fb75f4e",
    ),
    "cond_ddpm_wsss BraTS-224": (
        {
            "in_channels": 3,
            "model_channels": 128,
            "out_channels": 6,
            "channel_mult": SIX_LEVELS,
            "num_res_blocks": 3,
            "attention_downsample": (),
            "num_classes": 1000,
        },
        529,
        150_098_310,
        "888501a220ec1122",
    ),
    "diffusion-anomaly BraTS-256": (
        {
            "in_channels": 4,
            "model_channels": 128,
            "out_channels": 8,
            "channel_mult": SIX_LEVELS,
            "num_res_blocks": 2,
            "attention_downsample": (16,),
            "num_classes": 2,
            "num_heads": 1,
            "scale_shift": False,
        },
        427,
        113_681_160,
        "d577111b0a56652c",
    ),
}
CLASSIFIERS: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "ADM-256": (
        {
            "in_channels": 3,
            "model_channels": 128,
            "num_classes": 1000,
            "channel_mult": SIX_LEVELS,
            "num_res_blocks": 2,
            "attention_downsample": (8, 16, 32),
            "num_head_channels": 64,
            "image_size": 256,
            "resblock_updown": True,
            "pool": "attention",
        },
        249,
        54_096_360,
        "bc098f973cf9f8b9",
    ),
    "cond_ddpm_wsss CHAOS-128": (
        {
            "in_channels": 1,
            "model_channels": 128,
            "num_classes": 5,
            "channel_mult": FIVE_LEVELS,
            "num_res_blocks": 2,
            "attention_downsample": (4, 8, 16),
            "num_head_channels": 64,
            "image_size": 128,
            "resblock_updown": True,
            "pool": "attention",
        },
        221,
        42_055_301,
        "1782642fdc5142a1",
    ),
    "diffusion-anomaly BraTS-256": (
        {
            "in_channels": 4,
            "model_channels": 32,
            "num_classes": 2,
            "channel_mult": SIX_LEVELS,
            "num_res_blocks": 4,
            "attention_downsample": (8, 16, 32),
            "num_head_channels": 64,
            "image_size": 256,
            "resblock_updown": True,
            "pool": "attention",
        },
        405,
        5_452_962,
        "82342710abe61f20",
    ),
}
