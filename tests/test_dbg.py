import torch, pytest
from tests.support import video
from tests.patches.diffusers.test_multistep import field, run, AT, STEPS
@pytest.mark.parametrize("settings",[{}])
@pytest.mark.parametrize("make",[video.unipc])
def test_a(make, settings):
    start = torch.randn(1, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    moved = torch.zeros_like(start, dtype=torch.bool); moved[..., ::2] = True
    for k in range(6):
        g = run(lambda: make(**settings), start, moved=moved)
        print(k, g.isnan().sum(), run(lambda: make(**settings), start).isnan().sum(), start.isnan().sum())
