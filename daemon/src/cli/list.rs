//! What `list` commands print, however long the list is: rows are printed as they come.

use std::pin::pin;

use futures_util::{Stream, TryStreamExt as _};

use crate::cli::output;
use crate::cli::output::Tone;
use crate::config::OutputOptions;
use crate::contract::document::Document;
use crate::error::Result;

/// A table is as wide as its widest row, and so are gathered: rows up to this number, or to these bytes. A longer list is several
/// tables.
const TABLE_ROWS: usize = 1000;
const TABLE_BYTES: usize = 1024 * 1024;

/// How a row is shown.
pub(super) struct List<const N: usize, R: Fn(&Document) -> [String; N]> {
    /// What is shown of it with `--quiet`.
    pub(super) key: &'static str,
    pub(super) heading: [&'static str; N],
    pub(super) row: R,
    pub(super) tone: fn(&str) -> Tone,
}

impl<const N: usize, R: Fn(&Document) -> [String; N]> List<N, R> {
    /// False if there were no rows.
    pub(super) async fn print(
        &self,
        rows: impl Stream<Item = Result<Document>>,
        options: &OutputOptions,
    ) -> Result<bool> {
        let mut rows = pin!(rows);
        let mut any = false;
        let (mut table, mut bytes) = (Vec::new(), 0);
        while let Some(row) = rows.try_next().await? {
            if options.json {
                output::json_piece(if any { "," } else { "[" }, &row)?;
            } else if options.quiet {
                output::line(row.field(self.key))?;
            } else {
                let cells = (self.row)(&row);
                bytes += cells.iter().map(String::len).sum::<usize>();
                table.push(cells);
                if table.len() >= TABLE_ROWS || bytes >= TABLE_BYTES {
                    self.print_table(&mut table)?;
                    bytes = 0;
                }
            }
            any = true;
        }
        if options.json {
            output::json_end(if any { "]" } else { "[]" })?;
        }
        self.print_table(&mut table)?;
        Ok(any)
    }

    fn print_table(&self, rows: &mut Vec<[String; N]>) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        output::line(output::toned_table(self.heading, rows.drain(..), self.tone))
    }
}
