"""What `stoker bench trainer --size full` trains has the published geometry."""

import pytest


@pytest.mark.parametrize(("family", "millions"), [("sd1", 860), ("sdxl", 2567), ("flux", 11901)])
def test_the_full_denoiser_is_as_large_as_the_published_one(family, millions):
    import torch
    from diffusers import UNet2DConditionModel

    from gpu_agent.lora import bench
    from gpu_agent.lora.families import ldm

    with torch.device("meta"):
        if family == "flux":
            denoiser = bench.flux_transformer()
        else:
            layout = {"sd1": ldm.SD1, "sdxl": ldm.SDXL}[family]
            denoiser = UNet2DConditionModel.from_config(layout.template("unet/config.json"))
    assert round(sum(weight.numel() for weight in denoiser.parameters()) / 1e6) == millions


def test_families_without_published_geometry_here_are_named(capsys, tmp_path):
    from gpu_agent.lora import bench

    with pytest.raises(SystemExit):
        bench.main([str(tmp_path / "out"), "--family", "anima", "--size", "full"])
    assert "full is known for sd1, sdxl, flux" in capsys.readouterr().err
