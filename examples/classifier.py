"""Distils a wide classifier into a narrow one in a plain PyTorch loop: python examples/classifier.py"""

import torch
from torch import nn

import fusedkd

torch.manual_seed(0)
x, x_test = torch.randn(1024, 20), torch.randn(4096, 20)
rule = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 10)).requires_grad_(False)  # what is to be learned
y, y_test = (10 * rule(x)).softmax(-1).multinomial(1)[:, 0], (10 * rule(x_test)).argmax(-1)

teacher = rule  # in earnest: a large network trained before
for kd_weight in (0.0, 1.0):
    torch.manual_seed(1)
    student = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(500):
        optimizer.zero_grad()
        options = {"temperature": 2.0, "kd_weight": kd_weight, "ce_weight": 1.0}
        fusedkd.kd_loss(student(x), 10 * teacher(x), y, **options).backward()
        optimizer.step()
    accuracy = (student(x_test).argmax(-1) == y_test).float().mean()
    print(f"kd_weight {kd_weight:g}: test accuracy {accuracy:.3f}")
