"""A raw project: folders of patients and studies, the roles of their files, the private mapping."""
