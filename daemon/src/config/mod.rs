//! Options: what there is, where each value comes from, and whether the files that it comes from can be trusted.

mod command_options;
mod common_options;
pub mod file_trust;
mod options;
pub mod sources;

pub use command_options::{
    CompletionsOptions, CreateOptions, DefineScopeOptions, DeriveOptions, DropScopeOptions, EnabledOptions,
    ImportFormat, ImportOptions, ListOptions, PresentedToken, RevokeOptions, RotateOptions, ScopeCommand,
    ShowOptions, TokenCommand, VerifyOptions,
};
pub use common_options::{BatchOptions, OutputOptions};
pub use options::*;
