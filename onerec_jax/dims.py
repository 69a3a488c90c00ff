"""The dimension letters, used in every shape annotation and einsum.

  B  batch: rows
  S  context positions of a row
  T  targets of a row
  L  semantic-ID levels
  K  codes of a level
  D  model width
  H  query heads
  G  key/value heads
  Z  head width
  F  feed-forward width
  E  experts
  W  beam width
  R  rollout group
  I  items (without padding; tables have I + 1 rows, row 0 is padding)
  U  users

Depth is `num_layers`. The papers use N, G, S and K for other things.
"""
