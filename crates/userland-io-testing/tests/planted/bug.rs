//! Which bug an engine has.

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    // The ten of the contract.
    FlushDoesNothing,
    FuaIgnored,
    FlushOfOwnQueueOnly,
    ZeroesShowWhatLiesBelow,
    TornBlock,
    LateHolePunch,
    StaleCachePerQueue,
    MetadataBeforeData,
    ReorderingUnderPrefix,
    MapOnlyAtFlushUnderKill,
    // And more.
    ShortRead,
    LastBlockOffByOne,
    StaleExtents,
    DiscardBelowGranularity,
    LostError,
    LateSecondLeg,
    DroppedFutureActsAfterFlush,
    WrongFuaSplit,
    LatchedErrorForgotten,
    SlotReusedBeforeFlush,
    OldRecordsComeBack,
    SyncWithoutFlush,
    TornUnit,
    FlushErrorSwallowed,
    RecoveryWithoutFlush,
    StaleLend,
    NowaitTailLate,
    /// The last block of what was written to lent memory is stored later.
    LentTailLate,
    /// Memory is lent to be written to without what it holds.
    LentZeroes,
}
