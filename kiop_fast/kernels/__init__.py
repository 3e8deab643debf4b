"""Fused operations: tensors in, tensors out.

Each file is one operation: its math, its eager twin in plain torch, its Triton kernels and the
public function that chooses between them (``dispatch``).
"""

from kiop_fast.kernels.bank_replay import bank_replay as bank_replay
from kiop_fast.kernels.bank_replay import bank_replay_eager as bank_replay_eager
from kiop_fast.kernels.bn_match import BnMatch as BnMatch
from kiop_fast.kernels.bn_match import bn_match as bn_match
from kiop_fast.kernels.bn_match import bn_match_eager as bn_match_eager
from kiop_fast.kernels.dispatch import launches as launches
from kiop_fast.kernels.dispatch import reset_launches as reset_launches
from kiop_fast.kernels.info_nce import info_nce as info_nce
from kiop_fast.kernels.info_nce import info_nce_eager as info_nce_eager
from kiop_fast.kernels.mapped_kl import MappedKL as MappedKL
from kiop_fast.kernels.mapped_kl import mapped_kl as mapped_kl
from kiop_fast.kernels.mapped_kl import mapped_kl_eager as mapped_kl_eager
from kiop_fast.kernels.prompt_pad import border_index as border_index
from kiop_fast.kernels.prompt_pad import prompt_pad as prompt_pad
from kiop_fast.kernels.prompt_pad import prompt_pad_eager as prompt_pad_eager
from kiop_fast.kernels.prompt_pad import ring_padding as ring_padding
from kiop_fast.kernels.views import views as views
from kiop_fast.kernels.views import views_eager as views_eager
