//! `tollgated user …`: all that a user has.

use super::token;
use crate::config::UserCommand;
use crate::error::Result;
use crate::postgres::target::Target;

pub(super) async fn user(target: Target, command: UserCommand) -> Result<u8> {
    match command {
        UserCommand::Revoke(options) => {
            token::revoke_user(target, &options.user, options.reason.as_deref(), &options.output).await
        }
    }
}
