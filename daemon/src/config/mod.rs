//! Options: their names and bounds, where each value comes from, and whether the files that it comes from can be trusted.

mod api_options;
mod command_options;
mod common_options;
pub mod file_trust;
mod gateway_options;
mod import_key_options;
mod issuer_options;
mod key_options;
mod management_options;
mod options;
mod quota_options;
mod service_options;
mod session_options;
pub mod sources;
mod url_key_options;

pub use api_options::*;
pub use command_options::*;
pub use common_options::{BatchOptions, OutputOptions, StandbyOptions};
pub use gateway_options::*;
pub use import_key_options::*;
pub use issuer_options::*;
pub use key_options::*;
pub use management_options::*;
pub use options::*;
pub use quota_options::*;
pub use service_options::*;
pub use session_options::*;
pub use url_key_options::*;
