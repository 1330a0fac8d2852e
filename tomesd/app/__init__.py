"""The playground: a page in the browser where token merging can be tried (`tomesd playground`)."""
