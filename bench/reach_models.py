"""The models of `reach.py`: by package and version, the import path of each class, its arguments and its inputs.

An input is ("real", *shape) for normal random numbers or ("ids", below, *shape) for integers. Sizes are small; nothing is
downloaded.
"""

from __future__ import annotations

from typing import Any

Model = tuple[str, str, dict[str, Any], tuple[tuple[Any, ...], ...]]  # name, import path, arguments, inputs


def image(side: int, channels: int = 3, count: int = 2) -> tuple[tuple[Any, ...], ...]:
    return (("real", count, channels, side, side),)


def timm(name: str, side: int = 224) -> Model:
    return name, "timm.create_model", {"model_name": name}, image(side)


VIT = {"image_size": 64, "patch_size": 16, "num_classes": 7, "dim": 48, "depth": 2, "heads": 3, "mlp_dim": 96}
TEXT = (("ids", 50, 2, 24),)
LAYERS = {"dim": 48, "depth": 2, "heads": 3}

PACKAGES: dict[str, tuple[Model, ...]] = {
    "timm==1.0.31": (
        timm("vit_tiny_patch16_224"),
        timm("swinv2_tiny_window8_256", 256),
        timm("xcit_nano_12_p16_224"),
        timm("mvitv2_tiny"),
        timm("cait_xxs24_224"),
        timm("deit3_small_patch16_224"),
        timm("beit_base_patch16_224"),
        timm("eva02_tiny_patch14_224"),
        timm("maxvit_rmlp_pico_rw_256", 256),
        timm("twins_svt_small"),
        timm("pvt_v2_b0"),
        timm("mobilevit_xxs", 256),
    ),
    "torchvision==0.28.*": (
        ("vit_b_16", "torchvision.models.vit_b_16", {}, image(224, count=1)),
        ("swin_v2_t", "torchvision.models.swin_v2_t", {}, image(128, count=1)),
        ("maxvit_t", "torchvision.models.maxvit_t", {}, image(224, count=1)),
    ),
    "vit-pytorch==1.26.11": (
        ("ViT", "vit_pytorch.vit.ViT", VIT, image(64)),
        ("SimpleViT", "vit_pytorch.simple_vit.SimpleViT", VIT, image(64)),
        ("DeepViT", "vit_pytorch.deepvit.DeepViT", VIT, image(64)),
        ("CaiT", "vit_pytorch.cait.CaiT", VIT | {"cls_depth": 1}, image(64)),
        ("small data ViT", "vit_pytorch.vit_for_small_dataset.ViT", VIT, image(64)),
        (
            "XCiT",
            "vit_pytorch.xcit.XCiT",
            VIT | {"cls_depth": 1},
            image(64),
        ),
        (
            "CCT",
            "vit_pytorch.cct.CCT",
            {"img_size": 64, "embedding_dim": 48, "num_layers": 2, "num_heads": 3, "num_classes": 7},
            image(64),
        ),
    ),
    "x-transformers==2.31.10": tuple(
        (
            name,
            "x_transformers.TransformerWrapper",
            {"num_tokens": 50, "max_seq_len": 32, "attn_layers": ("x_transformers." + kind, LAYERS | options)},
            TEXT,
        )
        for name, kind, options in (
            ("Decoder", "Decoder", {}),
            ("Encoder", "Encoder", {}),
            ("Decoder, flash", "Decoder", {"attn_flash": True}),
            ("Decoder, rotary, grouped", "Decoder", {"rotary_pos_emb": True, "attn_kv_heads": 1}),
            ("Decoder, ALiBi", "Decoder", {"alibi_pos_bias": True}),
            ("Encoder, qk norm", "Encoder", {"attn_qk_norm": True}),
        )
    ),
    "openai-whisper==20250625": (
        (
            "Whisper",
            "whisper.model.Whisper",
            {
                "dims": (
                    "whisper.model.ModelDimensions",
                    dict(
                        n_mels=8, n_audio_ctx=24, n_audio_state=48, n_audio_head=3, n_audio_layer=2, n_vocab=50,
                        n_text_ctx=16, n_text_state=48, n_text_head=3, n_text_layer=2,
                    ),
                )
            },
            (("real", 2, 8, 48), ("ids", 50, 2, 12)),
        ),
    ),
    "monai==1.6.1": (
        (
            "ViT",
            "monai.networks.nets.ViT",
            dict(in_channels=1, img_size=(32, 32), patch_size=(8, 8), hidden_size=48, mlp_dim=96, num_layers=2,
                 num_heads=3, spatial_dims=2),
            image(32, 1),
        ),
        (
            "UNETR",
            "monai.networks.nets.UNETR",
            dict(in_channels=1, out_channels=2, img_size=32, hidden_size=48, mlp_dim=96, num_heads=3, feature_size=8,
                 spatial_dims=2),
            image(32, 1),
        ),
        (
            "SwinUNETR",
            "monai.networks.nets.SwinUNETR",
            dict(in_channels=1, out_channels=2, feature_size=12, spatial_dims=2),
            image(64, 1),
        ),
        (
            "DiffusionModelUNet",
            "monai.networks.nets.DiffusionModelUNet",
            dict(spatial_dims=2, in_channels=1, out_channels=1, channels=(32, 64), attention_levels=(False, True),
                 num_res_blocks=1, num_head_channels=16),
            (*image(16, 1), ("ids", 9, 2)),
        ),
    ),
    "segment-anything==1.0": (
        (
            "ImageEncoderViT",
            "segment_anything.modeling.ImageEncoderViT",
            dict(img_size=64, patch_size=8, embed_dim=48, depth=2, num_heads=3, out_chans=16, use_rel_pos=True,
                 window_size=3, global_attn_indexes=(1,)),
            image(64),
        ),
    ),
    "open-clip-torch==3.3.0": (
        (
            "VisionTransformer",
            "open_clip.transformer.VisionTransformer",
            dict(image_size=64, patch_size=16, width=48, layers=2, heads=3, mlp_ratio=2, output_dim=32),
            image(64),
        ),
        (
            "TextTransformer",
            "open_clip.transformer.TextTransformer",
            dict(context_length=24, vocab_size=50, width=48, heads=3, layers=2, output_dim=32),
            TEXT,
        ),
    ),
    "fair-esm==2.0.0": (
        ("ESM2", "esm.model.esm2.ESM2", dict(num_layers=2, embed_dim=48, attention_heads=3), (("ids", 20, 2, 24),)),
    ),
    "kornia==0.9.0": (
        (
            "LoFTR's encoder",
            "kornia.feature.loftr.loftr_module.transformer.LoFTREncoderLayer",
            dict(d_model=48, nhead=3, attention="full"),
            (("real", 2, 24, 48), ("real", 2, 20, 48)),
        ),
    ),
    "conformer==0.3.2": (
        ("Conformer", "conformer.Conformer", LAYERS | {"dim_head": 16}, (("real", 2, 24, 48),)),
    ),
    "tab-transformer-pytorch==0.6.1": (
        (
            "FTTransformer",
            "tab_transformer_pytorch.FTTransformer",
            LAYERS | dict(categories=(5, 6, 7), num_continuous=4),
            (("ids", 5, 2, 3), ("real", 2, 4)),
        ),
    ),
    "denoising-diffusion-pytorch==2.3.4": (
        (
            "Unet",
            "denoising_diffusion_pytorch.Unet",
            dict(dim=16, dim_mults=(1, 2), full_attn=(False, True)),
            (*image(16), ("ids", 9, 2)),
        ),
    ),
    "perceiver-pytorch==0.11.0": (
        (
            "Perceiver",
            "perceiver_pytorch.Perceiver",
            dict(num_freq_bands=4, depth=2, max_freq=8.0, num_latents=12, latent_dim=48, num_classes=7),
            (("real", 2, 8, 8, 3),),
        ),
        (
            "PerceiverIO",
            "perceiver_pytorch.PerceiverIO",
            dict(dim=32, queries_dim=24, depth=2, num_latents=12, latent_dim=48),
            (("real", 2, 20, 32),),
        ),
    ),
    "video-diffusion-pytorch==0.7.0": (
        (
            "Unet3D",
            "video_diffusion_pytorch.Unet3D",
            dict(dim=16, dim_mults=(1, 2)),
            (("real", 1, 3, 5, 16, 16), ("ids", 9, 1)),
        ),
    ),
    "timesformer-pytorch==0.4.1": (
        (
            "TimeSformer",
            "timesformer_pytorch.TimeSformer",
            dict(dim=48, image_size=32, patch_size=16, num_frames=3, num_classes=7, depth=2, heads=3, dim_head=16),
            (("real", 2, 3, 3, 32, 32),),
        ),
    ),
    "itransformer==0.8.1": (
        (
            "iTransformer",
            "iTransformer.iTransformer",
            LAYERS | dict(num_variates=11, lookback_len=24, dim_head=16, pred_length=5),
            (("real", 2, 24, 11),),
        ),
    ),
    "soft-moe-pytorch==0.1.9": (
        ("SoftMoE", "soft_moe_pytorch.SoftMoE", dict(dim=48, seq_len=24, num_experts=3), (("real", 2, 24, 48),)),
    ),
    "slot-attention==1.5.2": (
        ("SlotAttention", "slot_attention.SlotAttention", dict(num_slots=5, dim=48), (("real", 2, 24, 48),)),
    ),
    "axial-attention==0.6.1": (
        (
            "AxialAttention",
            "axial_attention.AxialAttention",
            dict(dim=48, dim_index=1, heads=3, num_dimensions=2),
            (("real", 2, 48, 9, 7),),
        ),
    ),
}  # fmt: skip
