"""The page of `attnres-probe report`. In come probed runs (`data.load_page_runs`);
out goes one HTML file that needs nothing else (`build.write_page`)."""
