//! Functions that consume what is good once must be committed before their answer is used. Those of a gateway, which answers
//! others over the network, are therefore not called in a transaction block, where it might be rolled back after the answer.
#![allow(unsafe_code)]

use crate::error::Error;
use crate::store::capabilities;
use pgrx::pg_sys;

/// 25001 in a transaction block of a role that is a gateway and nothing else.
pub(crate) fn check(function: &str) -> Result<(), Error> {
    // SAFETY: reads the state of this backend's transaction.
    if unsafe { pg_sys::IsInTransactionBlock(true) } && capabilities::only_a_gateway().is_some() {
        return Err(Error::consumed_in_a_transaction(function));
    }
    Ok(())
}
