"""What of a vector is sent, and as which bytes: ``encode(vector) -> message``, ``decode(message, out)`` adds it to out.

A compressor knows nothing of ranks and remembers nothing: what it does depends on its arguments alone.  Vectors are
flat float32 arrays in C order.  A message is a uint8 array: a header of 32 bytes (:class:`Header`), then the payload.
*n elements, d density, τ threshold; 32 bytes of header not counted.*

====================================  ==================================================  =====================
compressor                            what a message means                                bytes
====================================  ==================================================  =====================
:func:`none`                          every element                                       4n
:func:`cast`                          every element in 16 or 8 bits                       2n, n
:func:`threshold`                     ±τ where the element is at least τ                  4dn, at most n/4
:func:`topk`                          the dn largest elements                             8dn
:func:`randomk`                       dn elements at random places that all ranks know    4dn + 8
:func:`onebit`                        ± the mean magnitude, or a mean for each sign       n/8
:func:`sign_majority`                 ±1: a vote                                          n/8
:func:`ternary`                       ± the largest magnitude or 0, at random             n/4
:func:`qsgd`                          one of 2s + 1 levels of the norm, at random         n + 4n/bucket
:func:`natural`                       ± a power of two, at random                         9n/8
:func:`low_rank`                      a matrix of rank r                                  4r(rows + columns)
====================================  ==================================================  =====================

Error feedback (Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019) sends ``encode(backlog)`` and keeps
``backlog - meaning of the message``: :meth:`Compressor.encode_feedback` does both at once.
"""
