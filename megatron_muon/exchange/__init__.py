"""How slices travel: packing, all-to-alls, unpacking, and the talks of teams.

In: an ownership plan and this rank's slices. Out: whole matrices at their owners, and updates back at the slices.
Every rank of a group issues the same collectives in the same order; this room is the only one that issues them.
"""
