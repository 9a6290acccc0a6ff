"""Train a small timm model on a distilled set, from scratch: python examples/train_timm.py [reference or folder]."""

import sys

from diffstill import load  # isort: skip  (before timm: lets it load beside any build of torch)
import timm
import torch

transform = timm.data.create_transform(32, mean=(0.5,), std=(0.5,), crop_pct=1)
data = load(sys.argv[1] if len(sys.argv) > 1 else "distilled-digits@newest", transform=transform)
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True)
model = timm.create_model("test_convnext", num_classes=len(data.classes), in_chans=data.manifest.facts["channels"])
optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
for images, labels in (batch for _epoch in range(20) for batch in loader):
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    optimiser.step()
    optimiser.zero_grad()
right = sum(int((model.eval()(images).argmax(1) == labels).sum()) for images, labels in loader)
print(f"training accuracy {right / len(data):.1%} on {len(data)} images of {len(data.classes)} classes")
