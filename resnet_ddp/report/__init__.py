"""What a grid of runs came to: the paper's table, its Fig. 6. Nothing here imports torch.

summary.py      mean, deviation, interval of each model; the degradation statement
table.py        the table, in four formats
figure.py       Fig. 6
write.py        the command
"""
