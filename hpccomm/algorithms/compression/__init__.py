"""Compressors: ``encode(vector)`` returns a message, ``decode(message, out)`` adds the decoded vector to ``out``.

A compressor (:class:`~hpccomm.algorithms.compression.format.Compressor`) has no state and does not depend on ranks: a
message is a function of the arguments alone.  Vectors are flat float32 arrays in C order.  A message is a uint8 array:
a header of 32 bytes, then the payload.  *n elements, d density, τ threshold; the header is not counted.*

====================================  ==================================================  =====================
compressor                            decoded value of an element                         bytes
====================================  ==================================================  =====================
:func:`none`                          the element                                         4n
:func:`cast`                          the element in 16 or 8 bits                         2n, n
:func:`threshold`                     ±τ where its magnitude is at least τ                4dn, at most n/4
:func:`topk`                          the element, if among the dn largest                8dn
:func:`randomk`                       the element, if among dn at random positions        4dn + 8
:func:`onebit`                        ± the mean magnitude, or a mean for each sign       n/8
:func:`sign_majority`                 ±1: a vote                                          n/8
:func:`ternary`                       ± the largest magnitude or 0, at random             n/4
:func:`qsgd`                          one of 2s + 1 levels of the norm, at random         n + 4n/bucket
:func:`natural`                       ± a power of two, at random                         9n/8
:func:`low_rank`                      a matrix of rank r                                  4r(rows + columns)
====================================  ==================================================  =====================

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019) sends ``encode(backlog)`` and keeps the
backlog less the decoded vector: ``Compressor.encode_feedback`` does both in one pass.

Modules by family: ``selection`` (threshold, topk, randomk), ``signs`` (onebit, sign_majority), ``quantized`` (none,
cast, ternary, qsgd, natural), ``matrix_factors`` (low_rank); ``format`` holds the wire format.
"""
