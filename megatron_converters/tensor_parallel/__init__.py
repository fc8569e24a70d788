"""Converters by numbers: checkpoints that may lack args, between `mp_rank_*` trees and one file of weights."""
