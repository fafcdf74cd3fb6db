"""What a corpus is read from: files here and in S3, archives, tables, pages, source code, the demo's packages."""
