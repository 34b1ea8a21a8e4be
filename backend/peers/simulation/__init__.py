"""Many hosts in virtual time: the deciding code of peers, with a model of links below it."""
