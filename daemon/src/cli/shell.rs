//! What packages install beside the binary: completions for the shells, and the manual page.

use std::io::Write as _;

use clap::{Command, CommandFactory as _};
use clap_mangen::Man;

use crate::config::{Cli, CompletionsOptions};
use crate::error::{Error, Result};
use crate::process::exit;

pub(super) fn completions(options: &CompletionsOptions) -> Result<u8> {
    let mut text = Vec::new();
    clap_complete::generate(options.shell, &mut Cli::command(), "tollgated", &mut text);
    print(&text)
}

/// One page for all commands, so that it can be searched.
pub(super) fn man() -> Result<u8> {
    let mut command = Cli::command();
    command.build();
    let page = Man::new(command.clone()).section("8");
    let mut text = Vec::new();
    for part in [
        Man::render_title,
        Man::render_name_section,
        Man::render_synopsis_section,
        Man::render_description_section,
        Man::render_options_section,
    ] {
        part(&page, &mut text).map_err(Error::output)?;
    }
    for subcommand in leaves(&command) {
        let name = subcommand.get_bin_name().unwrap_or_else(|| subcommand.get_name()).to_uppercase();
        // Those of all commands stand above.
        let own = subcommand.clone().mut_args(|argument| match argument.is_global_set() {
            true => argument.hide(true),
            false => argument,
        });
        let mut body = Vec::new();
        let page = Man::new(own.clone());
        for part in
            [Man::render_synopsis_section, Man::render_description_section, Man::render_options_section]
        {
            part(&page, &mut body).map_err(Error::output)?;
        }
        if own.get_after_help().is_some() || own.get_after_long_help().is_some() {
            page.render_extra_section(&mut body).map_err(Error::output)?;
        }
        // Sections of a page of its own, which are parts of a section here.
        let body = String::from_utf8_lossy(&body).replace("\n.SH ", "\n.SS ");
        writeln!(text, ".SH {name}\n{}", body.replace(".SH SYNOPSIS", ".SS SYNOPSIS"))
            .map_err(Error::output)?;
    }
    print(&text)
}

/// The commands that do something, at any depth.
fn leaves(command: &Command) -> Vec<&Command> {
    let mut leaves = Vec::new();
    for subcommand in command.get_subcommands() {
        if subcommand.is_hide_set() || subcommand.get_name() == "help" {
            continue;
        }
        if subcommand.has_subcommands() {
            leaves.extend(self::leaves(subcommand));
        } else {
            leaves.push(subcommand);
        }
    }
    leaves
}

fn print(text: &[u8]) -> Result<u8> {
    let mut out = std::io::stdout().lock();
    out.write_all(text).and_then(|()| out.flush()).map_err(Error::output)?;
    Ok(exit::OK)
}
